"""The Dolly builder, on the real file where it is there."""

import json

import pytest

from gemma_jax.config.train import DataConfig
from gemma_jax.data import sources
from gemma_jax.data import tfds as tfds_lib
from tests import data_toy

NAME = 'dolly-15k/databricks-dolly-15k.jsonl'


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  return str(tmp_path_factory.mktemp('tfds'))


def test_real_dolly_has_its_records_in_three_splits(data_dir):
  path = data_toy.shared_file(NAME)
  with open(path) as f:
    rows = [json.loads(line) for line in f]
  splits = {
    name: tfds_lib.read_split('dolly', name, path, data_dir)
    for name in ('train', 'validation', 'test')
  }
  assert {name: len(split) for name, split in splits.items()} == {
    'train': 13_547,
    'validation': 734,
    'test': 730,
  }
  every = sum(splits.values(), [])  # noqa: RUF017
  key = lambda row: json.dumps(row, sort_keys=True)
  assert sorted(map(key, every)) == sorted(map(key, rows))
  prompts = [{(row['instruction'], row['context']) for row in split} for split in splits.values()]
  assert sum(map(len, prompts)) == len(set().union(*prompts))
  # The order is the file's.
  train = set(map(key, splits['train']))
  assert splits['train'] == [row for row in rows if key(row) in train]


def test_real_dolly_is_a_source(data_dir):
  path = data_toy.shared_file(NAME)
  config = DataConfig(path=f'tfds:dolly:{path}', max_records=101)
  found = sources.load_records(config, data_dir)
  read = lambda split: data_toy.records(tfds_lib.read_split('dolly', split, '', data_dir))
  assert found.train == read('train')[:101]
  assert found.heldout == read('validation')
  again = sources.load_heldout('tfds:dolly', 'dolly', tfds_dir=data_dir)
  assert again.records == found.heldout


def test_an_edited_copy_is_refused(tmp_path):
  path = data_toy.write_jsonl(
    tmp_path / 'databricks-dolly-15k.jsonl',
    [{'instruction': 'a', 'context': '', 'response': 'b', 'category': 'c'}],
  )
  config = DataConfig(path=f'tfds:dolly:{path}')
  with pytest.raises(ValueError, match='expected 2df9083338b4abd6bceb56357'):
    sources.load_records(config, str(tmp_path / 'data'))
  assert not (tmp_path / 'data').exists()


def test_the_builder_says_whose_records_they_are(tmp_path):
  builder = tfds_lib.make_builder('dolly', data_dir=str(tmp_path))
  assert builder.name == 'dolly'
  assert 'CC BY-SA 3.0' in builder.info.redistribution_info.license
  assert 'Databricks' in builder.info.description
  assert builder.URL.startswith('https://huggingface.co/datasets/databricks/')
