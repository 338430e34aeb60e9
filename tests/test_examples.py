"""Records to token ids, loss masks and rows, as the docstrings show."""

import collections
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
LEARNED = st.text(st.characters(exclude_categories=['Cs']), min_size=1)


def only(record, tokenizer=BYTES, **kwargs):
  """The one example of one record, as two lists."""
  (example,) = examples_lib.make_examples([record], tokenizer, **kwargs)
  return example.tokens.tolist(), example.loss_mask.tolist()


def document(length, response):
  """BOS, a prompt, a response of so many tokens, EOS; all ids differ."""
  tokens = np.array([2, *range(10, 8 + length), 1], np.int32)
  mask = np.zeros(length, np.int32)
  mask[length - 1 - response :] = 1
  return examples_lib.Example(tokens, mask)


def token_records(*lengths):
  """Token records; no two tokens of a row are alike, BOS apart."""
  starts = np.cumsum([10, *lengths])
  return [
    {'tokens': [2, *range(start, start + n - 1)]}
    for start, n in zip(starts.tolist(), lengths, strict=False)
  ]


@settings(deadline=None)
@given(
  prompt=st.text(st.characters(exclude_categories=['Cs'])), response=LEARNED
)
def test_prompt_and_response_are_tokenized_apart(prompt, response):
  record = {'prompt': prompt, 'response': response}
  for tokenizer in (BYTES, SENTENCEPIECE):
    before, after = tokenizer.encode(prompt), tokenizer.encode(response)
    tokens, mask = only(record, tokenizer, template='plain', seq_len=997)
    assert tokens == [2, *before, *after, 1]
    assert mask == [0] * (1 + len(before)) + [1] * (len(after) + 1)
    again, all_mask = only(
      record, tokenizer, template='plain', loss_on='all', seq_len=997
    )
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
  assert learned == [
    *SENTENCEPIECE.encode('b'), end, *SENTENCEPIECE.encode('Hi'), end, 1,
  ]  # fmt: skip
  assert tokens[0] == 2
  assert tokens.count(2) == tokens.count(1) == 1
  assert tokens.count(end) == 4


@pytest.mark.parametrize(
  'template', ['dolly', 'chat', 'plain', 'korean', 'en_ko', 'ko_en']
)
def test_generation_starts_with_the_tokens_of_training(template):
  record = {'prompt': 'Hi user', 'response': 'ab'}
  tokens, mask = only(record, SENTENCEPIECE, template=template)
  start = examples_lib.prompt_tokens(SENTENCEPIECE, template, 'Hi user')
  assert tokens[: len(start)] == start
  assert mask == [0] * len(start) + [1] * (len(tokens) - len(start))


def test_truncation_as_documented():
  tokens = np.array([2, 10, 11, 12, 20, 21, 1], np.int32)
  mask = np.array([0, 0, 0, 0, 1, 1, 1], np.int32)
  cut = examples_lib.truncate(examples_lib.Example(tokens, mask), 5)
  assert cut.tokens.tolist() == [2, 12, 20, 21, 1]
  assert cut.loss_mask.tolist() == [0, 0, 1, 1, 1]
  cut = examples_lib.truncate(examples_lib.Example(tokens, mask), 3)
  assert cut.tokens.tolist() == [2, 20, 21]
  assert cut.loss_mask.tolist() == [0, 1, 1]


@settings(deadline=None)
@given(
  prompt=st.integers(0, 31),
  response=st.integers(1, 31),
  seq_len=st.integers(2, 71),
)
def test_truncation_cuts_the_prompt_first(prompt, response, seq_len):
  full = document(2 + prompt + response, response)
  tokens, mask = examples_lib.truncate(full, seq_len)
  assert len(tokens) == len(mask) == min(len(full.tokens), seq_len)
  assert tokens[0] == 2
  assert mask[0] == 0
  learned, before = tokens[mask == 1], tokens[1:][mask[1:] == 0]
  whole_response = full.tokens[full.loss_mask == 1]
  whole_prompt = full.tokens[1 : 1 + prompt]
  np.testing.assert_array_equal(learned, whole_response[: len(learned)])
  np.testing.assert_array_equal(before, whole_prompt[prompt - len(before) :])
  assert len(learned) >= 1
  if len(learned) < len(whole_response):
    assert len(before) == 0


def test_truncation_of_a_chat_keeps_the_last_answer():
  mask = np.array([0, 0, 1, 1, 0, 0, 1, 1, 1], np.int32)
  tokens = np.array([2, 10, 20, 21, 11, 12, 22, 23, 1], np.int32)
  cut = examples_lib.truncate(examples_lib.Example(tokens, mask), 6)
  assert cut.tokens.tolist() == [2, 11, 12, 22, 23, 1]
  assert cut.loss_mask.tolist() == [0, 0, 0, 1, 1, 1]


def test_token_records_are_taken_as_they_are():
  record = {'tokens': [7, 8, 9, 5], 'loss_mask': [1, 0, 1, 0]}
  assert only(record, None) == ([7, 8, 9, 5], [0, 0, 1, 0])
  assert only(record, None, loss_on='all') == ([7, 8, 9, 5], [0, 0, 1, 0])
  assert only({'tokens': [7, 8, 9]}, None) == ([7, 8, 9], [0, 1, 1])
  # Too long: cut on the right.
  assert only(record, None, seq_len=3) == ([7, 8, 9], [0, 0, 1])


def test_token_ids_must_be_tokens():
  records = [{'tokens': [2, 262]}, {'tokens': [2, 263]}]
  examples_lib.make_examples(records, None, vocab_size=264)
  with pytest.raises(
    ValueError, match=r'record 1: got token id 263.*below 263'
  ):
    examples_lib.make_examples(records, None, vocab_size=263)


def test_text_needs_a_tokenizer():
  records = [{'tokens': [2, 5]}, {'prompt': 'a', 'response': 'b'}]
  with pytest.raises(ValueError, match=r'config\.model\.tokenizer=PATH'):
    examples_lib.make_examples(records, None)


def test_stats_count_what_became_of_the_records():
  records = [
    {'prompt': 'abc', 'response': 'de'},  # 7 tokens, cut to 5
    {'tokens': [2, 3, 4], 'loss_mask': [0, 0, 0]},  # nothing to learn
    {'tokens': [2]},  # nothing to learn
    {'tokens': [2, 3, 4]},
    {'tokens': [2, 3, 4]},  # a duplicate
    {'tokens': [2, 3, 4], 'loss_mask': [0, 0, 1]},  # none: another mask
    {'tokens': [2, 3, 4, 5, 6, 7, 8]},  # cut to 5
    {'tokens': [2, 3, 4, 5, 6, 7], 'loss_mask': [0] * 5 + [1]},  # cut away
  ]
  made = examples_lib.make_examples(records, BYTES, template='plain', seq_len=5)
  assert made.stats == examples_lib.ExampleStats(
    records=8,
    examples=5,
    tokens=5 + 3 + 3 + 3 + 5,
    supervised_tokens=3 + 2 + 2 + 1 + 4,
    truncated=2,
    dropped=3,
    duplicates=1,
  )
  assert made.record_ids.tolist() == [0, 3, 4, 5, 6]
  assert made.slots.tolist() == [4, 2, 2, 2, 4]
  with pytest.raises(ValueError, match=r'none of 2 records.*seq_len=5'):
    examples_lib.make_examples(records[1:3], None, seq_len=5)


def test_stats_as_a_line():
  stats = examples_lib.ExampleStats(9, 7, 12_345, 11, 2, 3, 1)
  assert stats.line('training') == (
    'training: 7 records, 12,345 tokens, 11 supervised, 2 truncated to '
    'seq_len, 3 dropped (no supervised token), 1 duplicates'
  )


def test_the_container_gives_back_each_example():
  records = token_records(5, 2, 7, 3)
  made = examples_lib.make_examples(records, None)
  assert [e.tokens.tolist() for e in made] == [r['tokens'] for r in records]
  assert all(e.tokens.dtype == e.loss_mask.dtype == np.int32 for e in made)
  assert made.offsets.tolist() == [0, 5, 7, 14, 17]
  with pytest.raises(IndexError):
    made[4]


def test_a_long_file_is_tokenized_in_order(monkeypatch):
  monkeypatch.setattr(examples_lib, '_CHUNK', 3)
  records = [{'prompt': str(i), 'response': 'a' * i} for i in range(1, 11)]
  records[4:4] = token_records(5)
  made = examples_lib.make_examples(records, BYTES, template='plain')
  alone = [only(r, template='plain')[0] for r in records]
  assert [e.tokens.tolist() for e in made] == alone


def test_a_row_as_documented():
  records = [
    {'tokens': [2, 10, 11, 20, 1], 'loss_mask': [0, 0, 0, 1, 1]},
    {'tokens': [2, 12, 21, 22, 1], 'loss_mask': [0, 0, 1, 1, 1]},
  ]
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

  That program differs in two ways, so that some rows cannot be equal: its
  vocabulary lacks runs of spaces (the reference in golden/ has them), so texts
  with two spaces in a row are compared decoded; and it leaves a quarter of
  seq_len to the prompt before it cuts a response, so those rows are left out.
  """
  from gemma_jax.formats import source

  dolly = data_toy.shared_file('dolly-15k/databricks-dolly-15k.jsonl')
  reference = data_toy.shared_file('dolly256_tokens.jsonl')
  with open(dolly) as f:
    records = [json.loads(line) for line, _ in zip(f, range(256), strict=False)]
  with open(reference) as f:
    expected = [json.loads(line) for line in f]
  tokenizer = source.open_base('gemma3_270m').tokenizer()
  made = examples_lib.make_examples(records, tokenizer, 'dolly', seq_len=512)
  counts = collections.Counter()
  for record, example, row in zip(records, made, expected, strict=True):
    wanted = examples_lib.Example(
      np.array(row['tokens']), np.array(row['loss_mask'])
    )
    if wanted.tokens[-1] != tokenizer.eos_id:
      counts['response cut'] += 1
    elif any('  ' in text for text in record.values()):
      counts['equal text'] += 1
      prompt, answer = _texts(tokenizer, example)
      wanted_prompt, wanted_answer = _texts(tokenizer, wanted)
      assert answer == wanted_answer
      # The prompt may have been cut, at tokens of different lengths.
      shorter = min(len(prompt), len(wanted_prompt))
      assert prompt[-shorter:] == wanted_prompt[-shorter:]
      assert len(example.tokens) == 512 or prompt == wanted_prompt
    else:
      counts['equal'] += 1
      np.testing.assert_array_equal(example.tokens, wanted.tokens)
      np.testing.assert_array_equal(example.loss_mask, wanted.loss_mask)
  assert counts == {'equal': 215, 'equal text': 34, 'response cut': 7}


def _texts(tokenizer, example):
  """What is read and what is learned, as text."""
  tokens, mask = example
  return tokenizer.decode(tokens[mask == 0]), tokenizer.decode(
    tokens[mask == 1]
  )
