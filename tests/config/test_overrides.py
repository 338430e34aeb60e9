"""Every field of a config is set from a command line, with right and wrong words."""

import dataclasses

from absl import flags
from ml_collections import config_flags
import pytest

from gemma_jax.config import train as config_lib
from gemma_jax.config.describe import describe
from gemma_jax.config.train import TrainConfig
from gemma_jax.sweep.grid import GridConfig, SweepConfig

CONFIGS = {
  'train': TrainConfig,
  'sweep': lambda: SweepConfig(grid=GridConfig(ranks=(1, 2), seeds=(0, 1, 2))),
}

# A word → what the field becomes, where the type alone does not say one.
RIGHT = {
  'early_stopping_evals': '0',
  'profile_steps': '(3, 4)',
  'trainable': '("lora/", "params/final_norm")',
  'lora.targets': 'q|up',
  'lora.alpha': '4.0',
  'lora.dropout': '0.25',
  'optimizer.b1': '0.5',
  'optimizer.b2': '0.5',
  'data.global_batch_size': '8',
  'data.seq_len': '64',
  'mesh.data': '2',
  'mesh.tensor': '2',
  'mesh.fsdp': '2',
  'grid.margin': '0.2',
  'grid.reference': '2',
  'grid.ranks': '(1, 4)',
  'grid.seeds': '(5, 6)',
  'grid.learning_rates': '(0.1, 0.2)',
  'grid.full_learning_rates': '(0.1,)',
  'grid.scale_rules': '("constant",)',
  'grid.targets': '("qv",)',
  'grid.inits': '("keras",)',
  'grid.factorizations': '("keras",)',
}

# A value that a field of this type, or of this name, refuses.
WRONG = {
  'seed': '-1',
  'epochs': '0.0',
  'trainable': '()',
  'mesh.shard_adapter': '3',
  'grid.rate_rules': '("sideways",)',
  'grid.baselines': '("sideways",)',
  'grid.margin': '1.5',
  'grid.reference': '3',
  'lora.targets': 'sideways',
  'lora.dropout': '1.5',
  'lora.alpha': '-1.0',
  'profile_steps': '(-1,)',
}

# What any text fits: it is looked at where it is used.
ANY_TEXT = ('compilation_cache', 'model.tokenizer', 'data.eval_path', 'lora.path', 'data.template')


def parse(kind, *words):
  """The config of a command line, resolved."""
  values = flags.FlagValues()
  line = ['command', *(f'--config.{word}' for word in words)]
  holder = config_flags.DEFINE_config_dataclass(
    'config', CONFIGS[kind](), flag_values=values, sys_argv=line
  )
  values(line)
  return holder.value.resolve()


def fields():
  """(kind, name, dataclass field) of every leaf but dicts, which files alone set."""
  for kind in CONFIGS:
    todo = [('', CONFIGS[kind]())]
    while todo:
      prefix, config = todo.pop()
      for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
          todo.append((f'{name}.', value))
        elif not isinstance(value, dict) and (kind == 'train' or name.startswith('grid.')):
          yield pytest.param(kind, name, field, value, id=f'{kind}-{name}')


def right_word(name, field, value):
  choices = field.metadata.get('choices')
  if name in RIGHT:
    return RIGHT[name]
  if choices and isinstance(value, tuple):
    return repr((choices[-1],))
  if choices:
    return next(word for word in choices if word != value)
  if isinstance(value, bool):
    return str(not value)
  if isinstance(value, int):
    return str(value + 1)
  if isinstance(value, float):
    return str(value + 0.5)
  return f'some_{field.name}'


def read(config, name):
  return config_lib.flatten(dataclasses.asdict(config))[name]


@pytest.mark.parametrize(('kind', 'name', 'field', 'value'), list(fields()))
def test_a_right_word_arrives(kind, name, field, value):
  word = right_word(name, field, value)
  others = ['steps=5'] if name == 'epochs' else []
  if name.startswith('mesh.') and name != 'mesh.fsdp':
    others = ['mesh.fsdp=1']
  got = read(parse(kind, f'{name}={word}', *others), name)
  assert type(got) is type(value)
  expected = word if isinstance(value, str) else eval(word)
  assert got == (type(value)(expected))
  if name != 'early_stopping_evals' and name not in ('grid.baselines',):
    assert got != value


@pytest.mark.parametrize(('kind', 'name', 'field', 'value'), list(fields()))
def test_a_wrong_word_is_refused_by_name(kind, name, field, value):
  if name in ANY_TEXT:
    pytest.skip('any text fits')
  if name in WRONG:
    word = WRONG[name]
  elif isinstance(value, bool):
    word = 'sideways'
  elif isinstance(value, int):
    word = '-7'
  elif isinstance(value, float):
    word = '-0.5'
  elif isinstance(value, tuple):
    word = 'sideways'
  else:
    word = 'sideways' if 'choices' in field.metadata else ''
  with pytest.raises((ValueError, flags.Error), match=name.split('.')[-1]):
    parse(kind, f'{name}={word}')


def test_a_misspelt_field_is_refused():
  with pytest.raises((AttributeError, flags.Error, ValueError, KeyError), match='rnak'):
    parse('train', 'lora.rnak=8')


def test_every_field_is_described_with_its_choices():
  for kind, make in CONFIGS.items():
    text = describe(make())
    for param in fields():
      of_kind, name, field, _ = param.values
      if of_kind != kind:
        continue
      (line,) = [x for x in text.splitlines() if x.startswith(f'--config.{name}=')]
      for word in field.metadata.get('choices', ()):
        assert word in line
