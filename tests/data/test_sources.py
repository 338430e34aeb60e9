"""Where records come from, and which are held out."""

import dataclasses
import gzip
import json
import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from gemma_jax.config.train import DataConfig
from gemma_jax.data import sources
from tests import data_toy


def record(i, **kwargs):
  return {'instruction': f'Q{i}', 'response': f'A{i}', **kwargs}


def records(numbers, **kwargs):
  return data_toy.records(record(i, **kwargs) for i in numbers)


prompts = st.integers(0, 40)
some_records = st.one_of(
  st.builds(
    lambda i, c, r: {'instruction': f'Q{i}', 'context': c, 'response': r},
    prompts,
    st.sampled_from(['', 'C', None]),
    st.sampled_from('ab'),
  ),
  st.builds(lambda i, r: {'prompt': f'Q{i}', 'response': r}, prompts, st.sampled_from('ab')),
  st.builds(lambda i: {'tokens': [2, i + 4, 1]}, prompts),
  st.builds(lambda i: {'en': f'E{i}', 'ko': f'K{i}'}, prompts),
  st.builds(
    lambda i, r: {
      'messages': [{'role': 'user', 'content': f'Q{i}'}, {'role': 'model', 'content': r}]
    },
    prompts,
    st.sampled_from('ab'),
  ),
)


def question(record):
  """What stands before the response; conversations are a form of their own."""
  return (record.tokens, record.key, *record.turns[:-1])


@settings(deadline=None)
@given(st.lists(some_records, min_size=1), st.randoms())
def test_a_question_is_on_one_side(rows, random):
  rows = data_toy.records(rows, 'en_ko')
  if len({question(row) for row in rows}) < 2:
    with pytest.raises(ValueError, match=r'expected at least 2.*data\.eval_path'):
      sources.split(rows)
    return
  train, heldout = sources.split(rows)
  assert train
  assert heldout
  assert not {question(r) for r in train} & {question(r) for r in heldout}
  # Both are the file's order, and nothing is lost or doubled.
  sides = {id(row): row in train for row in rows}
  assert [row for row in rows if sides[id(row)]] == train
  assert [row for row in rows if not sides[id(row)]] == heldout
  # The order of the file does not matter.
  shuffled = list(rows)
  random.shuffle(shuffled)
  held = sources.split(shuffled)[1]
  assert {question(r) for r in held} == {question(r) for r in heldout}


def test_about_a_twentieth_is_held_out():
  rows = records(range(4999))
  train, heldout = sources.split(rows)
  assert 200 < len(heldout) < 300
  assert len(train) + len(heldout) == 4999


def test_a_growing_file_keeps_its_held_out_records():
  rows = records(range(1009))
  before = sources.split(rows[:503])[1]
  after = sources.split(rows)[1]
  assert [row for row in rows[:503] if row in after] == before


def test_the_split_is_the_same_on_every_machine():
  _, heldout = sources.split(records(range(101)))
  assert [r.question for r in heldout] == ['Q14', 'Q17', 'Q21', 'Q33', 'Q34', 'Q47', 'Q65']


def test_a_file_is_split_unless_there_is_another(tmp_path):
  rows = [record(i) for i in range(211)]
  path = data_toy.write_jsonl(tmp_path / 'a.jsonl', rows)
  other = data_toy.write_jsonl(tmp_path / 'b.jsonl', [record(500), record(501)])
  config = DataConfig(path=path)
  parts = sources.load_records(config)
  assert (parts.train, parts.heldout) == sources.split(records(range(211)))
  config = dataclasses.replace(config, eval_path=other)
  parts = sources.load_records(config)
  assert parts.train == records(range(211))
  assert parts.heldout == records([500, 501])


def test_max_records_bounds_training_alone(tmp_path):
  rows = [record(i) for i in range(211)]
  path = data_toy.write_jsonl(tmp_path / 'a.jsonl', rows)
  train, heldout = sources.split(records(range(211)))
  parts = sources.load_records(DataConfig(path=path, max_records=17))
  assert parts.train == train[:17]
  assert parts.heldout == heldout


def test_records_with_context_may_be_left_out(tmp_path):
  rows = [record(i, context='C' * (i % 3)) for i in range(211)]
  path = data_toy.write_jsonl(tmp_path / 'a.jsonl', rows)
  parts = sources.load_records(DataConfig(path=path, with_context=False))
  kept = data_toy.records(row for row in rows if not row['context'])
  assert (parts.train, parts.heldout) == sources.split(kept)
  path = data_toy.write_jsonl(tmp_path / 'b.jsonl', [record(0, context='C')])
  with pytest.raises(ValueError, match='nothing is left'):
    sources.load_records(DataConfig(path=path, with_context=False))


def test_skipped_rows_of_both_sides_are_counted(tmp_path):
  path = data_toy.write_jsonl(tmp_path / 'a.jsonl', [record(0), '{', {}])
  other = data_toy.write_jsonl(tmp_path / 'b.jsonl', [record(1), '{'])
  config = DataConfig(path=path, eval_path=other, skip_bad_records=True)
  parts = sources.load_records(config)
  assert parts.skipped == {'invalid JSON': 2, 'field "response" is missing': 1}
  strict = dataclasses.replace(config, path=other, skip_bad_records=False)
  with pytest.raises(ValueError, match=r'data\.path: .*b\.jsonl line 2'):
    sources.load_records(strict)
  good = data_toy.write_jsonl(tmp_path / 'c.jsonl', [record(2)])
  strict = dataclasses.replace(config, path=good, skip_bad_records=False)
  with pytest.raises(ValueError, match=r'data\.eval_path: .*b\.jsonl line 2'):
    sources.load_records(strict)


def test_the_sample_brings_its_own_held_out_records():
  parts = sources.load_records(DataConfig(path='sample:seoul_travel'))
  assert len(parts.train) >= 240
  assert len(parts.heldout) >= 40
  train = {record.question for record in parts.train}
  assert not train & {record.question for record in parts.heldout}
  again = sources.load_heldout('sample:seoul_travel', 'dolly')
  assert again.records == parts.heldout
  with pytest.raises(ValueError, match='expected one of sample:seoul_travel'):
    sources.load_records(DataConfig(path='sample:nope'))


def test_evaluation_takes_all_of_a_file_in_its_order(tmp_path):
  rows = [record(i) for i in range(31)]
  path = data_toy.write_jsonl(tmp_path / 'a.jsonl', rows)
  assert sources.load_heldout(path, 'dolly').records == records(range(31))
  with pytest.raises(ValueError, match='--data: got'):
    sources.load_heldout(str(tmp_path / 'nope'), 'dolly', name='--data')


def test_real_dolly_splits_by_instruction_and_context():
  path = data_toy.shared_file('dolly-15k/databricks-dolly-15k.jsonl')
  parts = sources.load_records(DataConfig(path=path))
  assert len(parts.train) + len(parts.heldout) == 15_011
  assert parts.skipped == {}
  assert 0.04 < len(parts.heldout) / 15_011 < 0.06
  train = {question(row) for row in parts.train}
  assert not train & {question(row) for row in parts.heldout}
  alone = sources.load_records(DataConfig(path=path, with_context=False))
  assert len(alone.train) + len(alone.heldout) == 15_011 - 4467
  assert alone.heldout[0] in parts.heldout


@pytest.mark.parametrize('name', ['context', 'Context', 'input'])
def test_leaving_contexts_out_looks_where_rendering_does(tmp_path, name):
  rows = [record(i, **({name: 'C'} if i % 2 else {})) for i in range(101)]
  path = data_toy.write_jsonl(tmp_path / 'a.jsonl', rows)
  parts = sources.load_records(DataConfig(path=path, with_context=False))
  assert len(parts.train) + len(parts.heldout) == 51
  assert not any(r.context for r in (*parts.train, *parts.heldout))


def test_unread_fields_of_both_sides_are_counted_by_name(tmp_path):
  rows = [record(i, id=i, **({'lang': 'en'} if i % 2 else {})) for i in range(9)]
  path = data_toy.write_jsonl(tmp_path / 'a.jsonl', rows)
  config = DataConfig(path=path, eval_path=path, skip_bad_records=True)
  parts = sources.load_records(config)
  assert parts.lines() == ['unread fields: id × 18, lang × 8']
  reading = sources.load_heldout(path, 'dolly')
  assert reading.lines() == ['unread fields: id × 9, lang × 4']


def test_unread_fields_of_records_left_out_are_not_counted(tmp_path):
  rows = [record(i, id=i, **({'context': 'C', 'lang': 'en'} if i % 2 else {})) for i in range(30)]
  path = data_toy.write_jsonl(tmp_path / 'a.jsonl', rows)
  parts = sources.load_records(DataConfig(path=path, with_context=False))
  assert parts.lines() == ['unread fields: id × 15']
  parts = sources.load_records(DataConfig(path=path, eval_path=path, max_records=4))
  assert parts.lines() == ['unread fields: id × 34, lang × 17']


def test_reading_ends_where_there_is_enough(tmp_path):
  """What comes after is not even parsed: an unusable row there is no error."""
  rows = [record(i) for i in range(211)]
  path = data_toy.write_jsonl(tmp_path / 'a.jsonl', [*rows, {'nothing': 1}])
  train, heldout = sources.split(records(range(211)))
  parts = sources.load_records(DataConfig(path=path, max_records=7, max_eval_records=3))
  assert (parts.train, parts.heldout) == (train[:7], heldout[:3])
  other = data_toy.write_jsonl(tmp_path / 'b.jsonl', [record(500), {'nothing': 1}])
  config = DataConfig(path=path, eval_path=other, max_records=7, max_eval_records=1)
  parts = sources.load_records(config)
  assert (parts.train, parts.heldout) == (records(range(7)), records([500]))
  assert sources.load_heldout(other, 'dolly', most=1).records == records([500])
  with pytest.raises(ValueError, match='line 212: field'):
    sources.load_records(DataConfig(path=path, max_records=7))


def test_records_beyond_those_asked_for_are_not_kept(tmp_path):
  """Of 64 MiB, from some kilobytes, of two prompts: one has to move over to be held out."""
  path = tmp_path / 'a.jsonl.gz'
  with gzip.open(path, 'wt') as f:
    for i in range(64):
      f.write(json.dumps(record(i % 2, more=i) | {'response': 'A' * (1 << 20)}) + '\n')
  tracemalloc.start()
  try:
    parts = sources.load_records(DataConfig(path=str(path), max_records=2, max_eval_records=3))
    assert tracemalloc.get_traced_memory()[1] < 24 << 20
  finally:
    tracemalloc.stop()
  assert (len(parts.train), len(parts.heldout)) == (2, 3)
  assert len({r.question for r in (*parts.train, *parts.heldout)}) == 2
