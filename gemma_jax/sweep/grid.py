"""The trials that a sweep's config stands for.

Every trial is the base config with one value of each axis. Trials share
everything else: the order of the data for a seed, and initial factors that are
nested (A of a smaller rank is a prefix).
"""

import collections
import dataclasses
import itertools
import re
from typing import Any

import jax

from gemma_jax import pytree
from gemma_jax.config.lora import LoraConfig
from gemma_jax.config.sweep import AXES, GridConfig, SweepConfig
from gemma_jax.config.train import TrainConfig
from gemma_jax.lora import factors
from gemma_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Trial:
  """One run of a sweep.

  Attributes:
    name: of its folder; distinct.
    kind: base, lora or full.
    config: not resolved yet.
    axes: what distinguishes it from the others, for tables: `rank`, `seed`,
      `learning_rate` (before the rule), `scale_rule`, `rate_rule`, `targets`,
      `init`, `factorization`.
  """

  name: str
  kind: str
  config: TrainConfig
  axes: dict[str, Any]


def make_trials(config: SweepConfig, model_config: ModelConfig) -> list[Trial]:
  """Returns all trials of a sweep, baselines first.

  Args:
    config: resolved.
    model_config: the base's architecture, for equal parameters.

  Raises:
    ValueError: two trials are the same.
  """
  base, grid = config.base, config.grid
  trials = []
  if 'base' in grid.baselines:
    trials.append(Trial('base', 'base', base, {}))
  if 'full' in grid.baselines:
    trials += _full_trials(base, grid)
  rows = _product(base, grid)
  if grid.equal_parameters:
    _equalize_parameters(rows, base.lora, model_config)
  trials += [Trial(_name(axes, grid), 'lora', _lora_config(base, axes), axes) for axes in rows]
  ((name, count),) = collections.Counter(trial.name for trial in trials).most_common(1)
  if count > 1:
    raise ValueError(
      f'grid: got the trial {name} twice, expected distinct trials. Remove the repeated value '
      'from its axis (with equal_parameters, ranks that are solved to the same value).'
    )
  return trials


def parameters_per_rank(config: ModelConfig, settings: LoraConfig) -> int:
  """Returns the adapter parameters that one more rank costs."""
  settings = dataclasses.replace(settings, rank=1)
  return pytree.num_params(
    jax.eval_shape(lambda: factors.init(jax.random.key(0), config, settings))
  )


def _product(base: TrainConfig, grid: GridConfig) -> list[dict[str, Any]]:
  """One value of each axis, by its singular name."""
  own = {
    **vars(base.lora),
    'rate_rule': 'constant',
    'seed': base.seed,
    'learning_rate': base.optimizer.learning_rate,
  }
  columns = [getattr(grid, axis) or (own[name],) for axis, name in AXES.items()]
  return [dict(zip(AXES.values(), row, strict=True)) for row in itertools.product(*columns)]


def _equalize_parameters(rows: list[dict[str, Any]], lora: LoraConfig, model_config: ModelConfig):
  """Solves the ranks for as many parameters as they mean in the first row's form."""
  costs = [parameters_per_rank(model_config, _with_axes(lora, axes)) for axes in rows]
  for axes, cost in zip(rows, costs, strict=True):
    axes['rank'] = max(1, round(axes['rank'] * costs[0] / cost))


def _with_axes(lora: LoraConfig, axes: dict[str, Any]) -> LoraConfig:
  names = ('rank', 'scale_rule', 'targets', 'init', 'factorization')
  return dataclasses.replace(lora, **{name: axes[name] for name in names})


def _lora_config(base: TrainConfig, axes: dict[str, Any]) -> TrainConfig:
  """The config of a trial that trains an adapter."""
  power = {'constant': 0, 'over_r': 1, 'over_sqrt_r': 0.5}[axes['rate_rule']]
  rate = axes['learning_rate'] / axes['rank'] ** power
  return dataclasses.replace(
    base,
    seed=axes['seed'],
    lora=_with_axes(base.lora, axes),
    optimizer=dataclasses.replace(base.optimizer, learning_rate=rate),
  )


def _full_trials(base: TrainConfig, grid: GridConfig) -> list[Trial]:
  """Trials that train the kernels of the first target set whole, with no adapter."""
  targets = (grid.targets or (base.lora.targets,))[0]
  # Rank 1, which stays at its initial B = 0.
  lora = dataclasses.replace(base.lora, targets=targets, rank=1)
  trainable = (rf'params/layer(s|_\d+)/\w+/({"|".join(lora.target_names)})/w',)
  seeds = grid.seeds or (base.seed,)
  rates = grid.full_learning_rates or grid.learning_rates or (base.optimizer.learning_rate,)
  trials = []
  for seed, rate in itertools.product(seeds, rates):
    optimizer = dataclasses.replace(base.optimizer, learning_rate=rate)
    config = dataclasses.replace(
      base, seed=seed, lora=lora, optimizer=optimizer, trainable=trainable
    )
    axes = {'targets': targets, 'seed': seed, 'learning_rate': rate}
    trials.append(Trial(f'full-s{seed}-lr{rate:g}', 'full', config, axes))
  return trials


def _name(axes: dict[str, Any], grid: GridConfig) -> str:
  """'r8-s0-lr0.001', with the values of other axes that vary in front."""
  others = [name for axis, name in AXES.items() if len(getattr(grid, axis)) > 1]
  parts = [axes[name] for name in others if name not in ('seed', 'learning_rate', 'rank')]
  parts += [f'r{axes["rank"]}', f's{axes["seed"]}', f'lr{axes["learning_rate"]:g}']
  return re.sub(r'[^\w.+-]+', '_', '-'.join(parts))
