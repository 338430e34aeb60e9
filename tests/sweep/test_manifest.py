"""What a sweep keeps of its held-out records, whatever their form."""

import dataclasses

import pytest

from gemma_jax import files
from gemma_jax.config.sweep import GridConfig, SweepConfig
from gemma_jax.config.train import TrainConfig
from gemma_jax.sweep import manifest
from tests import data_toy, run_toy, sweep_toy

FORMS = (
  lambda i: {'instruction': f'Q{i}', 'context': 'C', 'response': 'A'},
  lambda i: {
    'messages': [
      {'role': 'user', 'content': f'Q{i}'},
      {'role': 'assistant', 'content': 'A'},
      {'role': 'user', 'content': 'And?'},
      {'role': 'assistant', 'content': 'B'},
    ]
  },
  lambda i: {'tokens': [2, 4 + 81, 4 + 48 + i, 70, 1], 'loss_mask': [0, 0, 0, 1, 1], 'category': 7},
)


def drafted(folder, form, **fields):
  """Lines of heldout.jsonl of records of one form."""
  rows = [form(i) for i in range(10)]
  path = data_toy.write_jsonl(folder / 'records.jsonl', rows)
  data_toy.write_jsonl(folder / 'heldout.jsonl', rows)
  config = sweep_toy.config(path)
  run_toy.set_fields(config.base, fields)
  return manifest.draft(config.resolve()).heldout


def test_every_form_has_a_prompt(tmp_path):
  single, tokens = (drafted(tmp_path, FORMS[i]) for i in (0, 2))
  assert [row['prompt'] for row in single] == [f'Q{i}' for i in range(10)]
  assert {row['context'] for row in single} == {'C'}
  assert [row['prompt'] for row in tokens] == [f'Q{i}' for i in range(10)]
  assert {row['category'] for row in tokens} == {'7'}


def test_a_conversation_is_told_by_its_roles(tmp_path):
  tokenizer = tmp_path / 'tokenizer.model'
  toy = data_toy.make_tokenizer(runs=(), words=())
  tokenizer.write_bytes(toy.model_proto)
  fields = {'model.tokenizer': str(tokenizer), 'data.template': 'chat', 'data.seq_len': 200}
  heldout = drafted(tmp_path, FORMS[1], **fields)
  assert [row['prompt'] for row in heldout] == [
    f'user: Q{i}\n\nmodel: A\n\nuser: And?' for i in range(10)
  ]


def test_a_manifest_has_the_fields_of_the_base_with_the_grid_beside_them(tmp_path):
  """As when a sweep's config was a `TrainConfig` with a grid, so that those sweeps go on."""
  config = SweepConfig(TrainConfig(steps=5), GridConfig(ranks=(1, 2)))
  names = [field.name for field in dataclasses.fields(TrainConfig)]
  assert list(config.to_dict()) == [*names, 'grid']
  written = {'steps': 5, 'lora': {'rank': 8}, 'grid': {'ranks': [1, 2]}}
  files.write_json(tmp_path / manifest.NAME, {'config': written})
  assert manifest.check_same_sweep(str(tmp_path), config)
  for changes, name in (({'steps': 6}, 'steps'), ({'grid': {'ranks': [1]}}, r'grid\.ranks')):
    files.write_json(tmp_path / manifest.NAME, {'config': written | changes})
    with pytest.raises(ValueError, match=f'was made with {name}='):
      manifest.check_same_sweep(str(tmp_path), config)
