"""Records to token ids, loss masks and rows, as the docstrings show."""

import collections
import dataclasses
import json

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from gemma_jax.data import examples as examples_lib
from gemma_jax.data import tokenizer as tokenizer_lib
from tests import data_toy

BYTES = tokenizer_lib.ByteTokenizer()
SENTENCEPIECE = data_toy.make_tokenizer()
LEARNED = st.text(st.characters(exclude_categories=['Cs'])).filter(str.strip)


def only(record, tokenizer=BYTES, **kwargs):
  """The one example of one record, as two lists."""
  (example,) = examples_lib.make_examples(
    data_toy.records([record], kwargs.get('template', 'dolly')), tokenizer, **kwargs
  )
  return example.tokens.tolist(), example.loss_mask.tolist()


def token_records(*lengths):
  """Token records; no two tokens of a row are alike, BOS apart."""
  starts = np.cumsum([10, *lengths])
  return data_toy.records(
    {'tokens': [2, *range(start, start + n - 1)]}
    for start, n in zip(starts.tolist(), lengths, strict=False)
  )


@settings(deadline=None)
@given(prompt=st.text(st.characters(exclude_categories=['Cs'])), response=LEARNED)
def test_prompt_and_response_are_tokenized_apart(prompt, response):
  record = {'prompt': prompt, 'response': response}
  for tokenizer in (BYTES, SENTENCEPIECE):
    before, after = tokenizer.encode(prompt), tokenizer.encode(response)
    tokens, mask = only(record, tokenizer, template='plain', seq_len=997)
    assert tokens == [2, *before, *after, 1]
    assert mask == [0] * (1 + len(before)) + [1] * (len(after) + 1)
    again, all_mask = only(record, tokenizer, template='plain', loss_on='all', seq_len=997)
    assert again == tokens
    assert all_mask == [0] + [1] * (len(tokens) - 1)


def test_chat_learns_model_turns_and_eos():
  record = {
    'messages': [
      {'role': 'user', 'content': 'a'},
      {'role': 'model', 'content': 'b'},
      {'role': 'user', 'content': 'ab'},
      {'role': 'model', 'content': 'Hi'},
    ]
  }
  tokens, mask = only(record, SENTENCEPIECE, template='chat')
  end = SENTENCEPIECE.end_of_turn_id
  learned = [t for t, m in zip(tokens, mask, strict=True) if m]
  assert learned == [*SENTENCEPIECE.encode('b'), end, *SENTENCEPIECE.encode('Hi'), end, 1]
  assert tokens[0] == 2
  assert tokens.count(2) == tokens.count(1) == 1
  assert tokens.count(end) == 4


def test_token_records_are_taken_as_they_are():
  record = {'tokens': [7, 8, 9, 5], 'loss_mask': [1, 0, 1, 0]}
  assert only(record, None) == ([7, 8, 9, 5], [0, 0, 1, 0])
  assert only(record, None, loss_on='all') == ([7, 8, 9, 5], [0, 0, 1, 0])
  assert only({'tokens': [7, 8, 9]}, None) == ([7, 8, 9], [0, 1, 1])
  # Too long: cut on the right.
  assert only(record, None, seq_len=3) == ([7, 8, 9], [0, 0, 1])


def test_token_ids_must_be_tokens():
  records = data_toy.records([{'tokens': [2, 262]}, {'tokens': [2, 263]}])
  examples_lib.make_examples(records, None, vocab_size=264)
  with pytest.raises(ValueError, match=r'record 1: got token id 263.*below 263'):
    examples_lib.make_examples(records, None, vocab_size=263)


def test_text_needs_a_tokenizer():
  records = data_toy.records([{'tokens': [2, 5]}, {'prompt': 'a', 'response': 'b'}])
  with pytest.raises(ValueError, match=r'Set model\.tokenizer=PATH'):
    examples_lib.make_examples(records, None)


def test_stats_count_what_became_of_the_records():
  records = data_toy.records(
    [
      {'prompt': 'abc', 'response': 'de'},  # 7 tokens, cut to 5
      {'tokens': [2, 3, 4], 'loss_mask': [0, 0, 0]},  # nothing to learn
      {'tokens': [2]},  # nothing to learn
      {'tokens': [2, 3, 4]},
      {'tokens': [2, 3, 4]},  # a duplicate
      {'tokens': [2, 3, 4], 'loss_mask': [0, 0, 1]},  # none: another mask
      {'tokens': [2, 3, 4, 5, 6, 7, 8]},  # cut to 5
      {'tokens': [2, 3, 4, 5, 6, 7], 'loss_mask': [0] * 5 + [1]},  # cut away
      {'prompt': 'a', 'response': '<eos>'},  # 8 tokens, cut to 5
      {'prompt': 'a', 'response': 'b', 'system': 'cde'},  # no room for that
    ]
  )
  made = examples_lib.make_examples(records, BYTES, template='plain', seq_len=5)
  assert made.stats == examples_lib.ExampleStats(
    records=10,
    examples=6,
    tokens=5 + 3 + 3 + 3 + 5 + 5,
    supervised_tokens=3 + 2 + 2 + 1 + 4 + 3,
    truncated=3,
    lost_prompts=1,
    lost_supervised_tokens=2 + 1 + 3 + 2,
    unlearnable=2,
    too_long=2,
    duplicates=1,
    spelling_controls=1,
    seq_len=5,
    template='plain',
  )
  assert made.record_ids.tolist() == [0, 3, 4, 5, 6, 8]
  assert made.slots.tolist() == [4, 2, 2, 2, 4, 4]
  with pytest.raises(ValueError, match=r'none of 3 records.*seq_len=5 \(1 are too long.* 2 have'):
    examples_lib.make_examples([*records[1:3], records[7]], None, seq_len=5)


def test_stats_as_a_line_and_as_warnings():
  stats = examples_lib.ExampleStats(
    1000,
    970,
    12_345,
    300,
    truncated=60,
    lost_prompts=11,
    lost_supervised_tokens=100,
    unlearnable=27,
    too_long=3,
    duplicates=1,
    spelling_controls=8,
    seq_len=128,
  )
  assert stats.line('training') == (
    'training: 970 records, 12,345 tokens, 300 supervised, 60 truncated to '
    'seq_len (11 lost part of their prompt), 30 left out (27 without a target, '
    '3 too long), 1 duplicates'
  )
  truncated, lost, too_long, unlearnable, spelled = stats.warnings('training')
  assert '60 of 1,000 records are truncated to seq_len=128; 25%' in truncated
  assert '11 of 1,000 records lost part of their prompt' in lost
  assert '3 of 1,000 records are left out: what has to stay' in too_long
  assert '27 of 1,000 records are left out: nothing in them' in unlearnable
  assert '8 records spell control tokens' in spelled
  assert 'data.parse_control_tokens=True' in spelled
  # The template that is there already is no advice.
  assert 'data.template=chat' in spelled
  *_, spelled = dataclasses.replace(stats, template='chat').warnings('training')
  assert 'data.parse_control_tokens=True' in spelled
  assert 'template=chat' not in spelled
  few = dataclasses.replace(
    stats, truncated=50, lost_prompts=10, unlearnable=0, too_long=0, parsed_controls=True
  )
  assert few.warnings('training') == []


def test_the_container_gives_back_each_example():
  records = token_records(5, 2, 7, 3)
  made = examples_lib.make_examples(records, None)
  assert [e.tokens.tolist() for e in made] == [list(r.tokens) for r in records]
  assert all(e.tokens.dtype == e.loss_mask.dtype == np.int32 for e in made)
  assert made.offsets.tolist() == [0, 5, 7, 14, 17]
  with pytest.raises(IndexError):
    made[4]


def test_a_long_file_is_tokenized_in_order(monkeypatch):
  monkeypatch.setattr(examples_lib, '_CHUNK', 3)
  rows = [{'prompt': str(i), 'response': 'a' * i} for i in range(1, 11)]
  rows[4:4] = [{'tokens': [2, 11, 12, 13, 14]}]
  made = examples_lib.make_examples(data_toy.records(rows), BYTES, template='plain')
  alone = [only(row, template='plain')[0] for row in rows]
  assert [e.tokens.tolist() for e in made] == alone


def test_a_row_as_documented():
  records = data_toy.records(
    [
      {'tokens': [2, 10, 11, 20, 1], 'loss_mask': [0, 0, 0, 1, 1]},
      {'tokens': [2, 12, 21, 22, 1], 'loss_mask': [0, 0, 1, 1, 1]},
    ]
  )
  made = examples_lib.make_examples(records, None)
  row = examples_lib.make_row(made, (0, 1), 10)
  assert {name: array.tolist() for name, array in row.items()} == {
    'tokens': [2, 10, 11, 20, 2, 12, 21, 22, 0, 0],
    'targets': [10, 11, 20, 1, 12, 21, 22, 1, 0, 0],
    'weights': [0, 0, 1, 1, 0, 1, 1, 1, 0, 0],
    'segment_ids': [1, 1, 1, 1, 2, 2, 2, 2, 0, 0],
    'positions': [0, 1, 2, 3, 0, 1, 2, 3, 0, 0],
  }


@settings(deadline=None)
@given(st.lists(st.integers(2, 13), max_size=7), st.integers(0, 11))
def test_documents_can_be_read_back_from_a_row(lengths, spare):
  records = token_records(*lengths, 2)
  made = examples_lib.make_examples(records, None)
  ids = list(range(len(lengths)))[::-1]
  seq_len = int(made.slots[: len(lengths)].sum()) + spare
  row = examples_lib.make_row(made, ids, seq_len)
  for segment, example_id in enumerate(ids, 1):
    here = row['segment_ids'] == segment
    tokens, mask = made[example_id]
    np.testing.assert_array_equal(row['tokens'][here], tokens[:-1])
    np.testing.assert_array_equal(row['targets'][here], tokens[1:])
    np.testing.assert_array_equal(row['weights'][here], mask[1:])
    np.testing.assert_array_equal(row['positions'][here], range(here.sum()))
  padding = row['segment_ids'] == 0
  assert padding.sum() == spare
  for name, array in row.items():
    assert array.shape == (seq_len,)
    assert not array[padding].any(), name
  if lengths:
    with pytest.raises(ValueError, match='need more slots'):
      examples_lib.make_row(made, ids, seq_len - spare - 1)


def test_a_batch_stacks_rows():
  made = examples_lib.make_examples(token_records(5, 2, 7), None)
  batch = examples_lib.make_batch(made, [(0, 1), (), (2,)], 11)
  assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
    'tokens': ((3, 11), 'int32'),
    'targets': ((3, 11), 'int32'),
    'weights': ((3, 11), 'float32'),
    'segment_ids': ((3, 11), 'int32'),
    'positions': ((3, 11), 'int32'),
  }
  assert not any(array[1].any() for array in batch.values())


@pytest.mark.real
def test_dolly_becomes_the_token_records_made_elsewhere():
  """The first 256 rows of Dolly, against token records of another program.

  That program differs in two ways: its vocabulary lacks runs of spaces (the
  reference in golden/ has them), so texts with two spaces in a row are compared
  decoded; and what it cuts to 512 tokens, it cuts elsewhere.
  """
  from gemma_jax.formats import open_base

  dolly = data_toy.shared_file('dolly-15k/databricks-dolly-15k.jsonl')
  reference = data_toy.shared_file('dolly256_tokens.jsonl')
  with open(dolly, encoding='utf-8') as f:
    rows = [json.loads(line) for line, _ in zip(f, range(256), strict=False)]
  with open(reference, encoding='utf-8') as f:
    expected = [json.loads(line) for line in f]
  tokenizer = open_base.open_base('gemma3_270m').tokenizer()
  made = examples_lib.make_examples(data_toy.records(rows), tokenizer, 'dolly', seq_len=512)
  counts = collections.Counter()
  for row, example, wanted in zip(rows, made, expected, strict=True):
    if len(example.tokens) == 512:
      counts['cut'] += 1
      assert len(wanted['tokens']) == 512
      # The instruction is whole.
      text = tokenizer.decode(example.tokens.tolist())
      assert text.startswith(f'Instruction:\n{row["instruction"]}')
    elif any('  ' in text for text in row.values()):
      counts['equal text'] += 1
      for mask in (0, 1):
        of_mask = np.array(wanted['loss_mask']) == mask
        assert tokenizer.decode(example.tokens[example.loss_mask == mask]) == tokenizer.decode(
          np.array(wanted['tokens'])[of_mask]
        )
    else:
      counts['equal'] += 1
      np.testing.assert_array_equal(example.tokens, wanted['tokens'])
      np.testing.assert_array_equal(example.loss_mask, wanted['loss_mask'])
  assert counts == {'equal': 212, 'equal text': 32, 'cut': 12}
