"""What batched adapters need, and gain, on a TPU slice that is not here.

With few rows a chip waits for the base's weights; adapters trained as one batch
read them once for all its members.
"""

import dataclasses
import functools

from gemma_jax.config.sweep import SweepConfig
from gemma_jax.formats import open_base
from gemma_jax.sweep import manifest, plan
from gemma_jax.tpu import forecast as forecast_lib
from gemma_jax.tpu.forecast import Forecast
from gemma_jax.tpu.topology import Topology


@dataclasses.dataclass(frozen=True)
class BatchForecast:
  """The largest batch of adapters from groups of trials that need the same memory.

  Attributes:
    names: of the trials that train at once.
    num_trials: in all of these groups.
    num_batches: of adapters, in which they train.
    together: the step of the whole batch.
    alone: the largest member's own step.
  """

  names: list[str]
  num_trials: int
  num_batches: int
  together: Forecast
  alone: Forecast

  @property
  def gain(self) -> float | None:
    """Least time of the members' own steps over that of the batch; None if one does not fit."""
    each, batch = self.alone.bound, self.together.bound
    if each is None or batch is None or not (self.together.fits and self.alone.fits):
      return None
    return len(self.names) * each.secs / batch.secs

  def report(self) -> str:
    """The forecast as text; the last line has the gain."""
    size = len(self.names)
    lines = [
      f'{self.num_trials} trials in {self.num_batches} batches of adapters, the largest of '
      f'{size}: {" ".join(self.names)}',
      self.together.report(),
    ]
    each, batch = self.alone.bound, self.together.bound
    if self.gain is not None and each is not None and batch is not None:
      lines.append(
        f'an update of one adapter alone takes at least {each.secs * 1e3:.2f} ms, '
        f'bound by {each.bound_by}; of the batch, {batch.secs * 1e3:.2f} '
        f'ms, {batch.secs / size * 1e3:.2f} ms per adapter: '
        f'{self.gain:.2f} times as fast'
      )
    return '\n'.join(lines)


def forecast(config: SweepConfig, topology: Topology) -> list[BatchForecast]:
  """Compiles the batches of adapters that a sweep would train there.

  Args:
    config: resolved; its data is not read.
    topology: a slice of one host.

  Returns:
    One forecast for each shape of batch.
  """
  source = open_base.open_base(config.base.model.path, config.base.model.tokenizer)
  adapters = manifest.check_trials(config, source.config).adapters
  alike: dict[tuple, list[list[str]]] = {}
  for names in plan.groups(adapters):
    key = plan.shape_key([adapters[name] for name in names])
    alike.setdefault(key, []).append(names)
  grid, forecasts = config.grid, []
  for same in alike.values():
    configs = [adapters[name] for name in same[0]]
    largest = max(configs, key=lambda c: c.lora.rank)
    step = functools.cache(functools.partial(forecast_lib.forecast, largest, topology))
    alone = step(1)
    parts = plan.divide(
      len(configs),
      lambda size, step=step: step(size).needed_bytes,
      max_size=grid.max_gang,
      limit_bytes=int(grid.memory_gib * 2**30 or plan.SHARE * topology.chip.hbm_bytes),
      base_bytes=alone.part_bytes['base'],
    )
    first = max(parts, key=len)
    forecasts.append(
      BatchForecast(
        names=[same[0][i] for i in first],
        num_trials=sum(map(len, same)),
        num_batches=len(parts) * len(same),
        together=step(len(first)),
        alone=alone,
      )
    )
  return forecasts
