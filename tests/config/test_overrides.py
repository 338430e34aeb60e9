"""Every field of a config is set from a command line, with right and wrong words."""

import dataclasses
import functools
from pathlib import Path

from absl import flags
from ml_collections import config_flags
import pytest

from gemma_jax.config.describe import describe
from gemma_jax.config.sweep import SweepConfig
from launch import messages
from tests.config import configs

# By which config_flags loads a file.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')

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
  words = [f'--config.{word}' for word in words]
  line = ['command', f'--config={Path(configs.__file__)}:{kind}', *words]
  holder = config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=line)
  values(line)
  return holder.value.resolve()


def parts(kind):
  """(config, prefix of its fields): what a command line sets, as dataclasses."""
  config = configs.get_config(kind)
  return [(config, '')] if kind == 'train' else [(config.base, ''), (config.grid, 'grid.')]


def fields():
  """(kind, name, dataclass field) of every leaf but dicts, which files alone set."""
  for kind in ('train', 'sweep'):
    todo = parts(kind)
    while todo:
      config, prefix = todo.pop()
      for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
          todo.append((value, f'{name}.'))
        elif not isinstance(value, dict):
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
  is_base = isinstance(config, SweepConfig) and not name.startswith('grid.')
  return functools.reduce(getattr, name.split('.'), config.base if is_base else config)


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


@pytest.mark.parametrize('kind', ['train', 'sweep'])
@pytest.mark.parametrize(
  ('name', 'field', 'known'),
  [
    ('lora.rnak', 'rnak', 'rank, alpha, '),
    ('lroa.rank', 'lroa', 'seed, steps, '),
    ('stpes', 'stpes', 'seed, steps, '),
  ],
)
def test_a_misspelt_field_is_refused_by_name(kind, name, field, known):
  with pytest.raises((KeyError, flags.Error)) as caught:
    parse(kind, f'{name}=8')
  message = messages.one_line(caught.value)
  assert message.startswith(f'--config: got the field {field!r}, expected one of {known}')


@pytest.mark.parametrize(
  ('kind', 'name', 'meant'),
  [
    ('train', 'global_batch_size', 'data.global_batch_size'),
    ('train', 'data.batch_size', 'data.global_batch_size'),
    ('train', 'optimizer.seq_len', 'data.seq_len'),
    ('train', 'lroa.rank', 'lora'),
    ('train', 'mesh.path', 'model.path or lora.path or data.path'),
    ('train', 'zzz', ''),
    ('sweep', 'learning_rte', 'optimizer.learning_rate'),
    ('sweep', 'grid.rank', 'grid.ranks'),
    ('sweep', 'grid.alpha', 'lora.alpha'),
    ('sweep', 'margin', 'grid.margin'),
    ('sweep', 'lora.zzz', ''),
  ],
)
def test_a_misspelt_field_is_answered_with_the_nearest_of_any_group(kind, name, meant):
  with pytest.raises((KeyError, flags.Error)) as caught:
    parse(kind, f'{name}=8')
  hint = messages.one_line(caught.value).partition('. Did you mean ')[2]
  assert hint == (f'{meant}?' if meant else '')


@pytest.mark.parametrize(('name', 'known'), [('grid.rank', 'ranks, seeds, '), ('gird.ranks', '')])
def test_a_misspelt_grid_is_refused_by_name(name, known):
  with pytest.raises(KeyError) as caught:
    parse('sweep', f'{name}=(8,)')
  message = messages.one_line(caught.value)
  field = 'rank' if known else 'gird'
  assert message.startswith(f'--config: got the field {field!r}, expected one of {known}')
  assert known or message.endswith('data, grid. Did you mean grid?')


def test_words_are_read_by_the_type_of_the_field_not_of_its_value():
  config = parse('loose', 'epochs=0.5', 'trainable=("lora/", "params/final_norm")').base
  assert (config.epochs, config.trainable) == (0.5, ('lora/', 'params/final_norm'))


def test_every_field_is_described_with_its_choices():
  for kind in ('train', 'sweep'):
    text = '\n'.join(describe(part, f'config.{prefix}'.rstrip('.')) for part, prefix in parts(kind))
    for param in fields():
      of_kind, name, field, _ = param.values
      if of_kind != kind:
        continue
      (line,) = [x for x in text.splitlines() if x.startswith(f'--config.{name}=')]
      for word in field.metadata.get('choices', ()):
        assert word in line
