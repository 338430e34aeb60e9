"""Every experiment can be built, resolved, and counted from shapes."""

import importlib
from pathlib import Path

import jax
import pytest

from gemma_jax import summary, train_state, variants
from gemma_jax.data import templates

ROOT = Path(__file__).parent.parent
NAMES = sorted(
  path.stem
  for path in (ROOT / 'experiments').glob('*.py')
  if 'def get_config(' in path.read_text()
)


def variant_of(config):
  name = config.model.path.removeprefix('random:')
  return variants.get(name)


@pytest.mark.parametrize('name', NAMES)
def test_card_and_config(name):
  module = importlib.import_module(f'experiments.{name}')
  for word in ('Question', 'Command', 'Cost', 'Result'):
    assert word in module.__doc__, word
  config = module.get_config().resolve()
  model_config = variant_of(config)
  templates.check_name(config.data.template)
  found = summary.summarize(config, model_config)
  assert found.counts['trainable'] > 0
  assert found.counts['frozen'] == found.counts['base']
  adapter = train_state.abstract_variables(config, model_config, 'float32')
  assert len(jax.tree.leaves(adapter['lora'])) > 0


def test_there_are_experiments():
  assert {'quickstart', 'dolly_lora', 'keras_tutorial', 'korean'} <= set(NAMES)


def test_the_tutorial_runs_on_another_base():
  module = importlib.import_module('experiments.keras_tutorial')
  assert module.get_config('gemma3_270m').model.path == 'gemma3_270m'
  assert module.get_config('gemma3_270m').lora == module.get_config().lora
