"""A grid's cells: which they are, and which are refused."""

import dataclasses

import pytest

from gemma_jax.config.sweep import GridConfig, SweepConfig
from gemma_jax.config.train import TrainConfig
from gemma_jax.model import variants
from gemma_jax.sweep import grid

MODEL = variants.get('gemma3_270m')


def sweep(**axes):
  return SweepConfig(grid=GridConfig(**axes)).resolve()


def cells(**axes):
  return grid.make_trials(sweep(**axes), MODEL)


def test_cells_are_the_product_and_differ_where_they_say():
  found = cells(ranks=(1, 8), seeds=(0, 3), learning_rates=(1e-3, 2e-3))
  base, *adapters = found
  assert base.kind == 'base'
  assert [cell.name for cell in adapters[:3]] == ['r1-s0-lr0.001', 'r8-s0-lr0.001', 'r1-s0-lr0.002']
  assert len(adapters) == 8
  for cell in adapters:
    config = cell.config.resolve()
    assert type(config) is TrainConfig
    assert config.lora.rank == cell.axes['rank']
    assert config.seed == cell.axes['seed']
    assert config.optimizer.learning_rate == cell.axes['learning_rate']


def test_an_axis_without_values_keeps_the_config():
  config = SweepConfig(TrainConfig(seed=5), GridConfig(ranks=(2,)))
  config.base.lora.targets = 'all'
  (cell,) = grid.make_trials(config.resolve(), MODEL)[1:]
  assert cell.config.seed == 5
  assert cell.config.lora.targets == 'all'


@pytest.mark.parametrize(
  ('rule', 'rate'), [('constant', 0.08), ('over_r', 0.005), ('over_sqrt_r', 0.02)]
)
def test_rate_rules(rule, rate):
  _, cell = cells(ranks=(16,), learning_rates=(0.08,), rate_rules=(rule,))
  assert cell.config.optimizer.learning_rate == pytest.approx(rate)


def test_equal_parameters_across_target_sets():
  """Counts are closed forms of `shared` figures: 18 layers, D 640, ..."""
  found = cells(ranks=(21,), targets=('qv', 'attention', 'all'), equal_parameters=True)
  names = [cell.name for cell in found[1:]]
  counts = {
    cell.axes['targets']: cell.axes['rank'] * grid.parameters_per_rank(MODEL, cell.config.lora)
    for cell in found[1:]
  }
  assert names[0].startswith('qv-r21')
  assert names[2].startswith('all-r4')
  # 184,320 / 4 a rank for q and v, 949,248 / 4 for all seven.
  assert counts['qv'] == 21 * 46_080
  assert counts['all'] == 949_248
  for targets, count in counts.items():
    cell = next(c for c in found[1:] if c.axes['targets'] == targets)
    step = grid.parameters_per_rank(MODEL, cell.config.lora)
    assert abs(count - counts['qv']) <= step / 2


def test_full_baseline_trains_the_kernels_of_the_targets_alone():
  found = cells(ranks=(2,), baselines=('full',), full_learning_rates=(1e-5, 1e-4), targets=('qv',))
  full = [cell for cell in found if cell.kind == 'full']
  assert [cell.name for cell in full] == ['full-s0-lr1e-05', 'full-s0-lr0.0001']
  (pattern,) = full[0].config.trainable
  import re

  for path, trained in (
    ('params/layers/attn/q/w', True),
    ('params/layer_3/attn/v/w', True),
    ('params/layers/attn/k/w', False),
    ('params/layers/attn/q_norm/scale', False),
    ('lora/layers/attn/q/lora_a', False),
  ):
    assert bool(re.match(pattern, path)) == trained, path


def test_arms_train_for_as_many_updates():
  config = SweepConfig(TrainConfig(early_stopping_evals=2), GridConfig(ranks=(1, 2)))
  with pytest.raises(ValueError, match='early_stopping_evals: got 2, expected 0'):
    config.resolve()


@pytest.mark.parametrize(
  ('axes', 'message'),
  [
    ({}, 'grid: got .*expected an axis with values'),
    ({'ranks': 4}, 'grid.ranks: got 4, expected a tuple'),
    ({'ranks': (4,), 'full_learning_rates': 0.1}, 'grid.full_learning_rates: got 0.1, expected a'),
    ({'ranks': (4,), 'baselines': 'full'}, "grid.baselines: got 'full', expected a tuple"),
    ({'ranks': (4,), 'rate_rules': ('over_2',)}, 'grid.rate_rules'),
    ({'ranks': (4,), 'baselines': ('all',)}, 'grid.baselines'),
    ({'ranks': (4,), 'max_gang': -1}, 'grid.max_gang: got -1'),
    ({'ranks': (4,), 'margin': 0.0}, r'grid.margin: got 0.0, .* in \(0, 1\)'),
    ({'ranks': (4,), 'margin': 10}, 'grid.margin: got 10'),
    ({'ranks': (4,), 'reference': 8}, 'grid.reference: got 8, expected 0 or'),
    ({'ranks': (4,), 'margin': float('nan')}, 'grid.margin: got nan'),
    ({'ranks': (4,), 'truncate': 3}, 'grid.truncate: got 3, expected True or False'),
  ],
)
def test_bad_grids(axes, message):
  with pytest.raises(ValueError, match=message):
    sweep(**axes)


def test_duplicate_cells():
  with pytest.raises(ValueError, match='r4-s0-lr5e-05 twice'):
    cells(ranks=(4, 2, 4))


def test_ranks_that_a_budget_makes_equal_are_duplicates():
  with pytest.raises(ValueError, match='solved to the same'):
    cells(ranks=(1, 2), targets=('qv', 'all'), equal_parameters=True)


def test_the_sweeps_own_config_stays_as_it_was():
  config = sweep(ranks=(3,))
  before = config.to_dict()
  _, cell = grid.make_trials(config, MODEL)
  cell.config.seed = cell.config.lora.rank = 77
  cell.config.optimizer.learning_rate = 77.0
  assert config.to_dict() == before


def test_resolved_is_a_copy_whose_parts_do_not_change():
  config = SweepConfig(grid=GridConfig(ranks=(1, 2)))
  resolved = config.resolve()
  assert resolved.to_dict() == config.to_dict() == resolved.resolve().to_dict()
  config.base.steps, config.grid.ranks = 77, (4,)
  assert (resolved.base.steps, resolved.grid.ranks) == (0, (1, 2))
  for part, name in (
    (resolved.base, 'steps'),
    (resolved.base.lora, 'rank'),
    (resolved.grid, 'ranks'),
  ):
    with pytest.raises(dataclasses.FrozenInstanceError, match=name):
      setattr(part, name, 5)


def test_a_field_of_the_base_is_none_of_the_sweep():
  """Written as before there was a base, it would be left out without a word."""
  with pytest.raises(AttributeError, match='steps'):
    SweepConfig().steps = 5
