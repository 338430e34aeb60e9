"""What stays of a document that is longer than a row."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from gemma_jax.data import encoding, examples, templates, truncation
from gemma_jax.data import tokenizer as tokenizer_lib
from tests import data_toy

BYTES = tokenizer_lib.ByteTokenizer()
TURNS = data_toy.make_tokenizer()


def fit(row, seq_len, template='dolly', tokenizer=BYTES):
  """(what it becomes, the whole document)."""
  (record,) = data_toy.records([row], template)

  def encode(record):
    spans = templates.render(template, record)
    return encoding.encode([spans], tokenizer)[0]

  whole = encode(record)
  return truncation.fit(record, whole, seq_len, encode, tokenizer), whole


def parts(document, tokenizer=BYTES):
  """Its prompt and its response, as text with the ends marked."""
  tokens, mask = document.arrays('response')
  texts = []
  for ids in (tokens[mask == 0], tokens[mask == 1]):
    end = '$' if len(ids) and ids[-1] == tokenizer.eos_id else ''
    texts.append(tokenizer.decode(ids.tolist()) + end)
  return texts


def test_a_prompt_keeps_a_quarter_of_the_row_and_loses_its_middle():
  """As the module's docstring shows it."""
  row = {'prompt': '123456789', 'response': 'abcdefghi'}
  fitted, _ = fit(row, 12, 'plain')
  assert parts(fitted.document) == ['19', 'abcdefghi']
  assert fitted.lost_prompt


@pytest.mark.parametrize(
  'seq_len, context, response',
  [
    (76, '0123456789', 'So it is, and so it was.$'),
    (72, '012789', 'So it is, and so it was.$'),
    (68, '09', 'So it is, and so it was.$'),
    (66, '', 'So it is, and so it was.$'),
    (60, '', 'So it is, and so it'),
  ],
)
def test_the_context_goes_first_and_the_instruction_stays(seq_len, context, response):
  row = {'instruction': 'Why?', 'context': '0123456789', 'response': 'So it is, and so it was.'}
  fitted, whole = fit(row, seq_len)
  assert parts(fitted.document) == [
    f'Instruction:\nWhy?\n\nContext:\n{context}\n\nResponse:\n',
    response,
  ]
  assert (fitted.document is whole) == (seq_len == 76)
  assert fitted.lost_prompt == (seq_len < 76)


def test_a_long_response_loses_its_end_before_a_short_question():
  row = {'instruction': 'Count hats.', 'response': 'hat, ' * 200}
  fitted, _ = fit(row, 128)
  prompt, response = parts(fitted.document)
  assert prompt == 'Instruction:\nCount hats.\n\nResponse:\n'
  assert response == ('hat, ' * 200)[: 127 - len(prompt)]  # and no EOS
  assert not fitted.lost_prompt


def test_an_instruction_is_shortened_last_and_not_at_its_ends():
  row = {'instruction': 'First ' + 'x' * 200 + ' last.', 'response': 'y' * 100}
  fitted, _ = fit(row, 100)
  prompt, response = parts(fitted.document)
  assert prompt.startswith('Instruction:\nFirst ')
  assert prompt.endswith(' last.\n\nResponse:\n')
  assert response == 'y' * 25  # a quarter of the row
  assert fitted.lost_prompt


def test_no_room_for_the_words_of_the_template():
  row = {'instruction': 'Why?', 'response': 'So.', 'system': 's' * 100}
  assert fit(row, 100)[0] == truncation.Fitted(None, lost_prompt=True)


def turns(*contents, system=None):
  first = [{'role': 'system', 'content': system}] if system else []
  roles = ('user', 'model')
  return {
    'messages': first + [{'role': roles[i % 2], 'content': c} for i, c in enumerate(contents)]
  }


def test_a_chat_loses_whole_oldest_turns_and_keeps_its_system():
  row = turns('aaa', 'b', 'abab', 'Hi', 'us', 'ab', system='Hi')
  _, whole = fit(row, 999, 'chat', TURNS)
  newer, _ = fit(turns('abab', 'Hi', 'us', 'ab', system='Hi'), 999, 'chat', TURNS)
  newest, _ = fit(turns('us', 'ab', system='Hi'), 999, 'chat', TURNS)
  for seq_len in range(newest.document.num_tokens, whole.num_tokens):
    fitted, _ = fit(row, seq_len, 'chat', TURNS)
    kept = newer if seq_len >= newer.document.num_tokens else newest
    assert fitted.document.pieces == kept.document.pieces
    assert fitted.lost_prompt


def test_a_long_turn_of_a_chat_keeps_its_frame():
  row = turns('a' * 99, 'ab', system='Hi')
  fitted, whole = fit(row, 40, 'chat', TURNS)
  assert fitted.document.num_tokens == 40
  controls = lambda document: [
    piece.span.text for piece in document.pieces if piece.span.is_control
  ]
  assert controls(fitted.document) == controls(whole)
  prompt, response = parts(fitted.document, TURNS)
  assert prompt.startswith('user\nHi\n\naaa')
  assert prompt.endswith('aaa\nmodel\n')
  assert response == 'ab$'


texts = st.text(st.characters(exclude_categories=['Cs'], exclude_characters='▁'))


@settings(deadline=None)
@given(
  question=texts,
  context=texts,
  response=texts.filter(str.strip),
  seq_len=st.integers(24, 90),
  name=st.sampled_from(['instruction', 'prompt']),
)
def test_shares_of_the_row(question, context, response, seq_len, name):
  """Each keeps a quarter; every place is used, but for parts of characters."""
  row = {name: question, 'context': context, 'response': response}
  for template, tokenizer in (('plain', BYTES), ('chat', TURNS)):
    fitted, whole = fit(row, seq_len, template, tokenizer)
    assert fitted.document is not None
    tokens, mask = fitted.document.arrays('response')
    full, full_mask = whole.arrays('response')
    assert 0 <= min(len(full), seq_len) - len(tokens) < 4
    learned, learnable = int(mask.sum()), int(full_mask.sum())
    asked, askable = len(tokens) - learned, len(full) - learnable
    assert learned > min(learnable, math.ceil(seq_len / 4)) - 4
    assert asked > min(askable, math.ceil(seq_len / 4)) - 4
    assert fitted.lost_prompt == (asked < askable)
    if '\ufffd' not in tokenizer.decode(full):
      assert '\ufffd' not in tokenizer.decode(tokens)
    # A response keeps its beginning.
    np.testing.assert_array_equal(tokens[mask == 1], full[full_mask == 1][:learned])


def test_spelled_blanks_do_not_move_the_cut():
  """U+2581 in a text is a blank to SentencePiece."""
  row = {'instruction': 'ab', 'context': '▁' * 40 + 'ab' * 40, 'response': 'Hi'}
  fitted, whole = fit(row, 60, 'dolly', TURNS)
  prompt, _ = parts(fitted.document, TURNS)
  assert prompt.startswith('Instruction:\nab\n\nContext:\n')
  assert prompt.endswith('ab\n\nResponse:\n')
  assert whole.num_tokens > 60


def test_turns_behind_what_is_learned_go_first():
  row = turns('Hi', 'ab', 'us', 'b' * 30)
  row['messages'][-1]['weight'] = 0
  fitted, whole = fit(row, 20, 'chat', TURNS)
  alone, _ = fit(turns('Hi', 'ab'), 20, 'chat', TURNS)
  assert whole.num_tokens > 20
  assert fitted.document.pieces == alone.document.pieces
  assert not fitted.lost_prompt


def test_a_context_stays_when_its_turn_goes():
  row = turns('Hi ' * 20, 'ab', 'us', 'ab') | {'context': 'Hi'}
  fitted, _ = fit(row, 30, 'chat', TURNS)
  prompt, _ = parts(fitted.document, TURNS)
  assert prompt == 'user\nus\n\nHi\nmodel\n'


def test_characters_stay_whole():
  """Bytes are the tokens here, three for a character."""
  row = {'prompt': '가나다라마바사아자차', 'response': '파' * 20}
  for seq_len in range(16, 90):
    fitted, _ = fit(row, seq_len, 'plain')
    assert '\ufffd' not in ''.join(parts(fitted.document))
    assert seq_len - 4 < fitted.document.num_tokens <= seq_len


def test_loss_on_all_leaves_out_answers_of_weight_0():
  row = {
    'messages': [
      {'role': 'user', 'content': 'a'},
      {'role': 'model', 'content': 'b', 'weight': 0},
      {'role': 'user', 'content': 'ab'},
      {'role': 'model', 'content': 'Hi'},
    ]
  }
  (example,) = examples.make_examples(data_toy.records([row]), TURNS, 'chat', loss_on='all')
  not_counted = example.tokens[example.loss_mask == 0].tolist()
  assert not_counted == [2, *TURNS.encode('b'), TURNS.end_of_turn_id]
