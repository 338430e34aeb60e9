"""A sweep's config: a base config, and the grid of what differs from it."""

import copy
import dataclasses
from typing import Any, get_origin

from gemma_jax.config import train
from gemma_jax.config.checks import (
  Freezable,
  at_least,
  check_choices,
  did_you_mean,
  field_paths,
  require,
)
from gemma_jax.config.lora import LoraConfig
from gemma_jax.config.train import TrainConfig

RATE_RULES = ('constant', 'over_r', 'over_sqrt_r')
BASELINES = ('base', 'full')

# Axis → what one of its values is called. The first changes least often.
AXES = {
  'targets': 'targets',
  'factorizations': 'factorization',
  'inits': 'init',
  'scale_rules': 'scale_rule',
  'rate_rules': 'rate_rule',
  'seeds': 'seed',
  'learning_rates': 'learning_rate',
  'ranks': 'rank',
}

_BASE_FIELDS = {field.name: field.type for field in dataclasses.fields(TrainConfig)}


def _of_lora(name: str) -> Any:
  """The choices of a field of `LoraConfig`, for the axis over its values."""
  return LoraConfig.__dataclass_fields__[name].metadata


@dataclasses.dataclass
class GridConfig(Freezable):
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
    axes = {name: getattr(self, name) for name in AXES}
    for name in (*axes, 'baselines', 'full_learning_rates'):
      values = getattr(self, name)
      require(isinstance(values, tuple | list), f'grid.{name}', values, 'a tuple of values')
    require(
      any(axes.values()),
      'grid',
      (),
      'an axis with values',
      'Set e.g. grid.ranks="(1,2,4)".',
    )
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
    for name in ('equal_parameters', 'truncate'):
      value = getattr(self, name)
      require(isinstance(value, bool), f'grid.{name}', value, 'True or False')
    is_size = isinstance(self.memory_gib, int | float) and self.memory_gib >= 0
    require(is_size, 'grid.memory_gib', self.memory_gib, 'a number >= 0')
    for name in ('sample_prompts', 'sample_tokens', 'max_gang'):
      at_least(f'grid.{name}', getattr(self, name), 0)


class SweepConfig:
  """A base config, and the grid around it.

  On a command line `--config.grid.ranks` is the grid's, and a field of the base
  has the name that it has for a single run: `--config.steps`. `config_flags`
  asks for it as an item, since it is no attribute here; of a dataclass, it would
  take the attributes alone.
  """

  __slots__ = ('base', 'grid')

  def __init__(self, base: TrainConfig | None = None, grid: GridConfig | None = None):
    self.base = base or TrainConfig()
    self.grid = grid or GridConfig()

  def __contains__(self, name: str) -> bool:
    return name in _BASE_FIELDS

  def __getitem__(self, name: str) -> Any:
    if name not in self:
      known = ', '.join([*_BASE_FIELDS, 'grid'])
      paths = [*field_paths(TrainConfig), 'grid', *field_paths(GridConfig, 'grid.')]
      raise KeyError(
        f'--config: got the field {name!r}, expected one of {known}.{did_you_mean(name, paths)}'
      )
    # The value's type says how a word is read; a file may have 1 for 1.0, [] for ().
    kind = get_origin(_BASE_FIELDS[name]) or _BASE_FIELDS[name]
    value = getattr(self.base, name)
    return kind(value) if kind in (float, tuple) else value

  def __setitem__(self, name: str, value: Any):
    setattr(self.base, name, value)

  def resolve(self) -> 'SweepConfig':
    """Returns a checked copy of frozen parts; its trials are checked one by one, later."""
    config = SweepConfig(self.base.resolve(), copy.deepcopy(self.grid))
    require(
      not config.base.early_stopping_evals,
      'early_stopping_evals',
      config.base.early_stopping_evals,
      '0: the arms of a sweep are compared after the same number of updates',
    )
    config.grid.check()
    config.grid.freeze()
    return config

  def to_dict(self) -> dict[str, Any]:
    """As the manifest has it: the base's fields, and the grid beside them."""
    return {**train.to_dict(self.base), 'grid': train.to_dict(self.grid)}
