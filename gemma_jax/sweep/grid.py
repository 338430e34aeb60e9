"""A sweep's config, and the trials that it stands for.

A `SweepConfig` is a `TrainConfig` with a grid: every trial is that config with
one value of each axis. Trials share everything else: the order of the data for a
seed, and initial factors that are nested (A of a smaller rank is a prefix).
"""

from collections.abc import Iterator
import copy
import dataclasses
import itertools
import re
from typing import Any

import jax

from gemma_jax import pytree
from gemma_jax.config.checks import check_choices, require
from gemma_jax.config.train import LoraConfig, TrainConfig
from gemma_jax.lora import factors
from gemma_jax.model.config import ModelConfig

RATE_RULES = ('constant', 'over_r', 'over_sqrt_r')
BASELINES = ('base', 'full')


def _of_lora(name: str) -> Any:
  """The choices of a field of `LoraConfig`, for the axis over its values."""
  return LoraConfig.__dataclass_fields__[name].metadata


@dataclasses.dataclass
class GridConfig:
  """The axes of a sweep; an axis without values keeps the config's own value.

  Attributes:
    ranks: `lora.rank`.
    seeds: `seed`: of the initial A, of dropout, and of the order of the data
      unless `data.order_seed` fixes that.
    learning_rates: `optimizer.learning_rate`, before the rate rule.
    scale_rules: `lora.scale_rule`.
    rate_rules: constant, over_r or over_sqrt_r: the rate is kept, or divided by
      r or its square root.
    targets: `lora.targets`.
    inits: `lora.init`.
    factorizations: `lora.factorization`.
    equal_parameters: ranks are those of the first target set and factorization;
      the others' ranks are solved for the same number of trainable parameters.
    baselines: base (the model as it is) and full (the kernels of the first
      target set trained whole).
    full_learning_rates: of the full baseline; () takes `learning_rates`.
    margin: share of the reference's gain over the base (in held-out loss)
      that a smaller rank may lose and still be called enough by the report.
      A result is judged by the margin that was set before the sweep.
    reference: the rank that smaller ones are compared with, also set before the
      sweep; 0 is the largest.
    truncate: evaluate the largest rank's adapters cut to every smaller rank.
    sample_prompts: held-out prompts that the adapters answer for the report.
    sample_tokens: most tokens of an answer.
    max_gang: most adapters trained as one batch; 0 is as many as fit in memory.
    memory_gib: for the training step of a batch of adapters; 0 is what the
      device has.
  """

  ranks: tuple[int, ...] = ()
  seeds: tuple[int, ...] = ()
  learning_rates: tuple[float, ...] = ()
  scale_rules: tuple[str, ...] = dataclasses.field(default=(), metadata=_of_lora('scale_rule'))
  rate_rules: tuple[str, ...] = dataclasses.field(default=(), metadata={'choices': RATE_RULES})
  targets: tuple[str, ...] = ()
  inits: tuple[str, ...] = dataclasses.field(default=(), metadata=_of_lora('init'))
  factorizations: tuple[str, ...] = dataclasses.field(
    default=(), metadata=_of_lora('factorization')
  )
  equal_parameters: bool = False
  baselines: tuple[str, ...] = dataclasses.field(default=('base',), metadata={'choices': BASELINES})
  full_learning_rates: tuple[float, ...] = ()
  margin: float = 0.1
  reference: int = 0
  truncate: bool = True
  sample_prompts: int = 3
  sample_tokens: int = 48
  max_gang: int = 0
  memory_gib: float = 0.0

  def check(self):
    axes = [getattr(self, name) for name in AXES]
    for name, values in zip(AXES, axes, strict=True):
      require(isinstance(values, tuple | list), f'grid.{name}', values, 'a tuple of values')
    require(any(axes), 'grid', (), 'an axis with values', 'Set e.g. grid.ranks="(1,2,4)".')
    check_choices(self, 'grid')
    for names, kind, expected in (
      (('ranks', 'seeds'), int, 'integers'),
      (('learning_rates', 'full_learning_rates'), int | float, 'numbers'),
      (('targets',), str, 'presets or regexes'),
    ):
      for name in names:
        values = getattr(self, name)
        is_fine = all(isinstance(x, kind) and not isinstance(x, bool) for x in values)
        require(is_fine, f'grid.{name}', values, f'a tuple of {expected}')
    for value in self.targets:
      LoraConfig(targets=value).check()
    is_share = isinstance(self.margin, float) and 0 < self.margin < 1
    require(is_share, 'grid.margin', self.margin, 'a number in (0, 1)')
    require(
      self.reference in (0, *self.ranks),
      'grid.reference',
      self.reference,
      f'0 or one of grid.ranks={tuple(self.ranks)}',
    )
    is_size = isinstance(self.memory_gib, int | float) and self.memory_gib >= 0
    require(is_size, 'grid.memory_gib', self.memory_gib, 'a number >= 0')
    for name in ('sample_prompts', 'sample_tokens', 'max_gang'):
      value = getattr(self, name)
      is_fine = isinstance(value, int) and value >= 0
      require(is_fine, f'grid.{name}', value, 'an integer >= 0')


# Trials are made in this order: the first axis changes least often.
AXES = (
  'targets',
  'factorizations',
  'inits',
  'scale_rules',
  'rate_rules',
  'seeds',
  'learning_rates',
  'ranks',
)


@dataclasses.dataclass
class SweepConfig(TrainConfig):
  """A `TrainConfig` whose runs differ along the axes of `grid`."""

  grid: GridConfig = dataclasses.field(default_factory=GridConfig)

  def resolve(self) -> 'SweepConfig':
    """Returns a checked, frozen copy; its trials are checked one by one, later."""
    config = super().resolve()
    require(
      not config.early_stopping_evals,
      'early_stopping_evals',
      config.early_stopping_evals,
      '0: the arms of a sweep are compared after the same number of updates',
    )
    config.grid.check()
    return config


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
  grid = config.grid
  values = {name: getattr(grid, name) for name in AXES}
  trials = []
  if 'base' in grid.baselines:
    trials.append(Trial('base', 'base', _train_config(config), {}))
  if 'full' in grid.baselines:
    trials += _full_trials(config)
  for combination in _product(values, config):
    axes = dict(combination)
    if grid.equal_parameters:
      axes['rank'] = _equal_rank(config, axes, model_config)
    trials.append(Trial(_name(axes, values), 'lora', _lora_config(config, axes), axes))
  seen = set()
  for trial in trials:
    if trial.name in seen:
      raise ValueError(
        f'grid: got the trial {trial.name} twice, expected distinct trials. '
        'Remove the repeated value from its axis (with equal_parameters, ranks '
        'that are solved to the same value).'
      )
    seen.add(trial.name)
  return trials


def parameters_per_rank(config: ModelConfig, settings: LoraConfig) -> int:
  """Returns the adapter parameters that one more rank costs."""
  settings = dataclasses.replace(settings, rank=1)
  return pytree.num_params(
    jax.eval_shape(lambda: factors.init(jax.random.key(0), config, settings))
  )


def _product(values, config) -> Iterator[dict[str, Any]]:
  """Yields one value of each axis, by its singular name."""
  own = {
    'targets': config.lora.targets,
    'factorizations': config.lora.factorization,
    'inits': config.lora.init,
    'scale_rules': config.lora.scale_rule,
    'rate_rules': 'constant',
    'seeds': config.seed,
    'learning_rates': config.optimizer.learning_rate,
    'ranks': config.lora.rank,
  }
  columns = [values[name] or (own[name],) for name in AXES]
  for row in itertools.product(*columns):
    yield {
      'targets' if name == 'targets' else name[:-1]: value
      for name, value in zip(AXES, row, strict=True)
    }


def _equal_rank(config, axes, model_config) -> int:
  """Returns the rank that gives a trial as many parameters as its first sibling."""
  grid = config.grid

  def per_rank(targets, factorization):
    return parameters_per_rank(
      model_config, dataclasses.replace(config.lora, targets=targets, factorization=factorization)
    )

  first = per_rank(
    *(
      (getattr(grid, name) or (getattr(config.lora, single),))[0]
      for name, single in (('targets', 'targets'), ('factorizations', 'factorization'))
    )
  )
  mine = per_rank(axes['targets'], axes['factorization'])
  return max(1, round(axes['rank'] * first / mine))


def _lora_config(config: SweepConfig, axes: dict[str, Any]) -> TrainConfig:
  """The `TrainConfig` of a trial."""
  made = _train_config(config)
  made.seed = axes['seed']
  names = ('rank', 'scale_rule', 'targets', 'init', 'factorization')
  for name in names:
    setattr(made.lora, name, axes[name])
  power = {'constant': 0, 'over_r': 1, 'over_sqrt_r': 0.5}[axes['rate_rule']]
  rate = axes['learning_rate'] / axes['rank'] ** power
  made.optimizer.learning_rate = rate
  return made


def _full_trials(config: SweepConfig) -> list[Trial]:
  """Trials that train the kernels of the first target set whole, with no adapter."""
  grid = config.grid
  trials = []
  rates = grid.full_learning_rates or grid.learning_rates
  for seed in grid.seeds or (config.seed,):
    for rate in rates or (config.optimizer.learning_rate,):
      made = _train_config(config)
      made.seed = seed
      made.optimizer.learning_rate = rate
      made.lora.targets = (grid.targets or (config.lora.targets,))[0]
      made.lora.rank = 1  # stays at its initial B = 0
      names = '|'.join(made.lora.target_names)
      made.trainable = (rf'params/layer(s|_\d+)/\w+/({names})/w',)
      axes = {'targets': made.lora.targets, 'seed': seed, 'learning_rate': rate}
      trials.append(Trial(f'full-s{seed}-lr{rate:g}', 'full', made, axes))
  return trials


def _train_config(config: SweepConfig) -> TrainConfig:
  """The sweep's config without its grid, mutable."""
  names = [field.name for field in dataclasses.fields(TrainConfig)]
  made = TrainConfig(**{n: copy.deepcopy(getattr(config, n)) for n in names})
  for part in vars(made).values():
    if dataclasses.is_dataclass(part):
      vars(part).pop('_is_frozen', None)
  return made


def _name(axes: dict[str, Any], values: dict[str, tuple[Any, ...]]) -> str:
  """'r8-s0-lr0.001', with the values of other axes that vary in front."""
  parts = []
  for name in AXES[:5]:
    if len(values[name]) > 1:
      parts.append(axes['targets' if name == 'targets' else name[:-1]])
  parts += [f'r{axes["rank"]}', f's{axes["seed"]}', f'lr{axes["learning_rate"]:g}']
  return re.sub(r'[^\w.+-]+', '_', '-'.join(parts))
