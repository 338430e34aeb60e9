"""What a sweep's gangs need, and gain, on a TPU slice that is not here.

A small batch leaves a chip waiting for the base's weights; a gang reads them
once for all its members.
"""

import dataclasses
import functools

from gemma_jax.formats import open_base
from gemma_jax.sweep import manifest, plan
from gemma_jax.sweep.grid import SweepConfig
from gemma_jax.tpu import forecast as forecast_lib
from gemma_jax.tpu.forecast import Forecast
from gemma_jax.tpu.topology import Topology


@dataclasses.dataclass(frozen=True)
class GangForecast:
  """Of the largest gang of a group of cells that differ in what a gang may.

  Attributes:
    names: of the cells that train at once.
    num_cells: of all groups that need the same.
    num_gangs: in which they train.
    together: the gang's step.
    alone: the largest member's own step.
  """

  names: list[str]
  num_cells: int
  num_gangs: int
  together: Forecast
  alone: Forecast

  @property
  def gain(self) -> float | None:
    """Least time of the members' own steps over that of the gang's."""
    each, gang = self.alone.bound, self.together.bound
    if each is None or gang is None or not (self.together.fits and self.alone.fits):
      return None
    return len(self.names) * each.secs / gang.secs

  def report(self) -> str:
    """As text; the last line has the gain."""
    size = len(self.names)
    lines = [
      f'{self.num_cells} cells in {self.num_gangs} gangs, the largest of '
      f'{size}: {" ".join(self.names)}',
      self.together.report(),
    ]
    each, gang = self.alone.bound, self.together.bound
    if self.gain is not None and each is not None and gang is not None:
      lines.append(
        f'an update of one adapter alone: {each.secs * 1e3:.2f} ms at the '
        f'least, bound by {each.bound_by}; of the gang: {gang.secs * 1e3:.2f} '
        f'ms, {gang.secs / size * 1e3:.2f} ms an adapter: '
        f'{self.gain:.2f} times as fast'
      )
    return '\n'.join(lines)


def forecast(config: SweepConfig, topology: Topology) -> list[GangForecast]:
  """Compiles the gangs that a sweep would train there.

  Args:
    config: resolved; no record of its data is read.
    topology: a slice of one host.

  Returns:
    One for each kind of gang.
  """
  source = open_base.open_base(config.model.path, config.model.tokenizer)
  adapters = manifest.check_cells(config, source.config).adapters
  alike: dict[tuple, list[list[str]]] = {}
  for names in plan.groups(adapters):
    key = plan.shape_key([adapters[name] for name in names])
    alike.setdefault(key, []).append(names)
  grid, found = config.grid, []
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
    found.append(
      GangForecast(
        names=[same[0][i] for i in first],
        num_cells=sum(map(len, same)),
        num_gangs=len(parts) * len(same),
        together=step(len(first)),
        alone=alone,
      )
    )
  return found
