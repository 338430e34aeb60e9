"""Every experiment can be built, resolved, and counted from shapes."""

import importlib
from pathlib import Path

import jax
import pytest

from gemma_jax.config.sweep import SweepConfig
from gemma_jax.data import templates
from gemma_jax.lora import factors
from gemma_jax.model import variants
from gemma_jax.runs import summary
from gemma_jax.sweep import grid
from gemma_jax.training import state

ROOT = Path(__file__).parents[2]
NAMES = sorted(
  path.stem for path in (ROOT / 'experiments').glob('*.py') if 'def get_config(' in path.read_text()
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
  config = config.base if isinstance(config, SweepConfig) else config
  model_config = variant_of(config)
  templates.check_name(config.data.template)
  found = summary.summarize(config, model_config)
  assert found.counts['trainable'] > 0
  assert found.counts['frozen'] == found.counts['base']
  adapter = state.abstract_variables(model_config, config.lora, 'float32')
  assert len(jax.tree.leaves(adapter['lora'])) > 0


SWEEPS = [name for name in NAMES if name.endswith('_ablation')]


@pytest.mark.parametrize('name', SWEEPS)
def test_no_cell_of_a_sweep_is_refused(name):
  config = importlib.import_module(f'experiments.{name}').get_config().resolve()
  model_config = variant_of(config.base)
  cells = [cell for cell in grid.make_trials(config, model_config) if cell.kind == 'lora']
  arms = {}
  for cell in cells:
    resolved = cell.config.resolve()
    factors.check_rank(model_config, resolved.lora)
    # The gradient's norm depends on the arm, and so would what a bound does.
    assert resolved.optimizer.clip_norm == 0
    rest = {k: v for k, v in cell.axes.items() if k != 'learning_rate'}
    arms.setdefault(str(rest), set()).add(cell.axes['learning_rate'])
  assert len(arms) >= 30  # six arms, five seeds
  assert all(len(rates) >= 5 for rates in arms.values())


def test_there_are_experiments():
  assert {'quickstart', 'dolly_lora', 'keras_tutorial', 'korean'} <= set(NAMES)
  assert len(SWEEPS) == 5


def test_the_tutorial_runs_on_another_base():
  module = importlib.import_module('experiments.keras_tutorial')
  assert module.get_config('gemma3_270m').model.path == 'gemma3_270m'
  assert module.get_config('gemma3_270m').lora == module.get_config().lora
