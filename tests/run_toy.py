"""A whole run in seconds: a tiny random base, twenty short records."""

import dataclasses
import functools
import json

from gemma_jax.config.train import (
  BaseConfig,
  DataConfig,
  LoraConfig,
  MeshConfig,
  OptimizerConfig,
  TrainConfig,
)


def write_records(folder, count=20):
  """Writes a file of question/answer records and returns its path."""
  path = folder / 'records.jsonl'
  words = ('palace', 'market', 'river', 'hill', 'tower', 'garden', 'temple')
  rows = [
    {
      'instruction': f'Where is {words[i % 7]} {i}?',
      'response': f'Past the {words[(3 * i + 1) % 7]}, on line {i % 5}.',
    }
    for i in range(count)
  ]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows), 'utf-8')
  return str(path)


def config(records, **changes) -> TrainConfig:
  """A config of 7 updates with evaluations and checkpoints in between."""
  base = TrainConfig(
    steps=7,
    eval_every_steps=3,
    checkpoint_every_steps=2,
    compilation_cache='off',
    model=BaseConfig(path='random:tiny3'),
    lora=LoraConfig(rank=3, targets='all', dropout=0.1),
    mesh=MeshConfig(fsdp=1),
    optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.1),
    data=DataConfig(path=records, seq_len=96, global_batch_size=2),
  )
  return dataclasses.replace(base, **changes)


def set_fields(config, fields) -> None:
  """Sets fields by their names, e.g. {'mesh.fsdp': 4}."""
  for name, value in fields.items():
    *parents, last = name.split('.')
    setattr(functools.reduce(getattr, parents, config), last, value)


def config_file(folder, records, **fields) -> str:
  """An experiment file of `config` for a command, with fields set."""
  path = folder / 'toy_experiment.py'
  lines = [f'  config.{name} = {value!r}\n' for name, value in fields.items()]
  path.write_text(
    'from tests import run_toy\n\n\ndef get_config():\n'
    f'  config = run_toy.config({records!r})\n' + ''.join(lines) + '  return config\n'
  )
  return str(path)
