"""A whole sweep in seconds: three ranks, two rates, two seeds, a tiny base."""

import json

from gemma_jax.config.lora import LoraConfig
from gemma_jax.config.sweep import GridConfig, SweepConfig
from tests import run_toy

CATEGORIES = ('brainstorming', 'open_qa')


def write_records(folder, count=60) -> str:
  """`run_toy.write_records` with a category for each."""
  path = run_toy.write_records(folder, count)
  with open(path, encoding='utf-8') as f:
    rows = [json.loads(line) for line in f]
  heldout = folder / 'heldout.jsonl'
  for name, part in ((path, rows[16:]), (heldout, rows[:16])):
    with open(name, 'w', encoding='utf-8') as f:
      for i, row in enumerate(part):
        f.write(json.dumps({**row, 'category': CATEGORIES[i % 2]}) + '\n')
  return path


def config(records, **axes) -> SweepConfig:
  """Five updates of 12 cells in two gangs; `axes` replace those of the grid."""
  base = run_toy.config(
    records,
    steps=5,
    eval_every_steps=2,
    checkpoint_every_steps=2,
    lora=LoraConfig(targets='qv', alpha=5.0),
  )
  base.data.seq_len = 48
  base.data.eval_path = str(records).replace('records.', 'heldout.')
  grid = {
    'ranks': (1, 2, 5),
    'seeds': (0, 3),
    'learning_rates': (1e-3, 1e-2),
    'sample_prompts': 2,
    'sample_tokens': 3,
  }
  return SweepConfig(base, GridConfig(**{**grid, **axes}))


def config_file(folder, records, **axes) -> str:
  """An experiment file of `config` for the command."""
  path = folder / 'toy_sweep.py'
  path.write_text(
    'from tests import sweep_toy\n\n\ndef get_config():\n'
    f'  return sweep_toy.config({records!r}, **{axes!r})\n'
  )
  return str(path)
