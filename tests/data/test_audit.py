"""Records that are well-formed one by one, and still not what was meant."""

import logging

from gemma_jax.data import audit as audit_lib
from tests import data_toy


def pair(prompt, response):
  return {'prompt': prompt, 'response': response}


def audit(train, heldout):
  """Of rows of any form."""
  return audit_lib.audit(data_toy.records(train), data_toy.records(heldout))


def test_exact_and_normalised_leaks_are_told_apart():
  train = [pair('Where is it?', 'There.'), pair('서울은 어디?', '한국'), {'tokens': [2, 5, 7]}]
  heldout = [
    pair('Where is it?', 'There.'),
    pair('  where  IS it', 'there!'),
    pair('Where is it?', 'Elsewhere.'),
    pair('서울은, 어디？', '한국.'),
    {'tokens': [2, 5, 7]},
    {'tokens': [2, 5, 7], 'loss_mask': [0, 0, 1]},
  ]
  found = audit(train, heldout)
  assert found.leaked == (0, 4)
  assert found.alike == (1, 3)


def test_a_question_with_another_answer_is_said():
  """Two forms of a question may fall on both sides of a split."""
  turns = [{'role': 'user', 'content': 'Q'}, {'role': 'model', 'content': 'B'}]
  heldout = [pair('Q', 'B'), pair('R', 'A'), {'messages': turns}, pair('', 'C')]
  found = audit([pair('Q', 'A'), pair('', 'A'), {'tokens': [2, 5]}], heldout)
  assert found.asked == (0, 2)
  assert found.leaked == found.alike == ()


def test_texts_of_punctuation_are_not_all_alike():
  found = audit([pair('?', '!')], [pair('.', ',')])
  assert found.alike == ()


def test_forms_of_one_record_are_the_same_record():
  turns = [{'role': 'user', 'content': 'Hi'}, {'role': 'model', 'content': 'Hello'}]
  found = audit(
    [{'messages': turns}], [pair('Hi', 'Hello'), {'instruction': 'Hi', 'response': 'Hello'}]
  )
  assert found.leaked == (0, 1)


def test_empty_prompts_and_repeats_in_training():
  train = [
    pair('a', 'b'),
    pair(' \n', 'b'),
    {'instruction': '', 'context': 'c', 'response': 'b'},
    pair('a', 'b'),
    {'instruction': 'a', 'response': 'b'},
  ]
  found = audit(train, [])
  assert found.empty_prompts == (1,)
  assert found.repeated == (3, 4)


def test_each_kind_is_one_warning_with_its_records(caplog):
  train = [pair('a', 'b')] * 12
  with caplog.at_level(logging.WARNING):
    audit(train, [pair('a', 'b')]).log()
  assert [r.getMessage() for r in caplog.records] == [
    '11 of 12 training records repeat another one: 1, 2, 3, 4, 5, 6, 7, 8, ...',
    '1 of 1 held-out records are also in training, word for word; their loss measures memory: 0',
  ]


def test_clean_records_are_not_mentioned(caplog):
  audit([pair('a', 'b')], [pair('c', 'd')]).log()
  assert not caplog.records
