"""Records that are well-formed one by one, and still not what was meant."""

import logging

from gemma_jax.data import audit as audit_lib


def pair(prompt, response):
  return {'prompt': prompt, 'response': response}


def test_exact_and_normalised_leaks_are_told_apart():
  train = [
    pair('Where is it?', 'There.'),
    pair('서울은 어디?', '한국'),
    {'tokens': [2, 5, 7]},
  ]
  heldout = [
    pair('Where is it?', 'There.'),
    pair('  where  IS it', 'there!'),
    pair('Where is it?', 'Elsewhere.'),
    pair('서울은, 어디？', '한국.'),
    {'tokens': [2, 5, 7]},
    {'tokens': [2, 5, 7], 'loss_mask': [0, 0, 1]},
  ]
  found = audit_lib.audit(train, heldout, 'dolly')
  assert found.leaked == (0, 4)
  assert found.alike == (1, 3)


def test_texts_of_punctuation_are_not_all_alike():
  found = audit_lib.audit([pair('?', '!')], [pair('.', ',')], 'dolly')
  assert found.alike == ()


def test_forms_of_one_record_are_the_same_record():
  turns = [
    {'role': 'user', 'content': 'Hi'},
    {'role': 'model', 'content': 'Hello'},
  ]
  found = audit_lib.audit(
    [{'messages': turns}],
    [pair('Hi', 'Hello'), {'instruction': 'Hi', 'response': 'Hello'}],
    'chat',
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
  found = audit_lib.audit(train, [], 'dolly')
  assert found.empty_prompts == (1,)
  assert found.repeated == (3, 4)


def test_each_kind_is_one_warning_with_its_records(caplog):
  train = [pair('a', 'b')] * 12
  with caplog.at_level(logging.WARNING):
    audit_lib.audit(train, [pair('a', 'b')], 'dolly').log()
  assert [r.getMessage() for r in caplog.records] == [
    '11 of 12 training records repeat another one: 1, 2, 3, 4, 5, 6, 7, 8, ...',
    '1 of 1 held-out records also stand in training, word for word; their loss '
    'measures memory: 0',
  ]


def test_clean_records_are_not_mentioned(caplog):
  audit_lib.audit([pair('a', 'b')], [pair('c', 'd')], 'dolly').log()
  assert not caplog.records
