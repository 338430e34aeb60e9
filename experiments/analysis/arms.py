"""The arms of a sweep, each at the learning rate that validation chose.

Rates are chosen on the validation records and losses reported on the test
records, so that no choice flatters what is reported.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

from experiments.analysis import intervals
from experiments.analysis.intervals import Estimate
from gemma_jax.sweep.results import Arm, Outcome, Sweep


@dataclasses.dataclass(frozen=True)
class Row:
  """An arm at its own best rate.

  Attributes:
    label: 'rank 4', with the other axes that vary.
    arm: its axes.
    cells: one a seed.
    rate: the learning rate that validation chose.
    at_edge: whether that is the lowest or the highest that was tried, so that
      a better one may lie beyond.
    clipped: share of the updates whose gradient was clipped, mean over seeds;
      None where clipping is off.
    validation: mean loss over seeds, nats per token.
    test: the same on the test records.
  """

  label: str
  arm: Arm
  cells: list[Outcome]
  rate: float
  at_edge: bool
  clipped: float | None
  validation: float
  test: float

  @property
  def rank(self) -> int:
    """Of the adapters."""
    return dict(self.arm)['rank']

  @property
  def parameters(self) -> int:
    """Trainable ones."""
    return self.cells[0].entry['trainable_parameters']

  @property
  def seconds(self) -> float:
    """Of training, mean over seeds."""
    return float(np.mean([cell.seconds for cell in self.cells]))


def rows(sweep: Sweep) -> list[Row]:
  """All arms with a finished cell, fewest parameters first.

  Raises:
    ValueError: no adapter has been trained to its end.
  """
  chosen = sweep.chosen()
  if not chosen:
    raise ValueError(
      f'{sweep.folder}: got no finished cell with an adapter, expected at '
      'least one. Run launch.sweep on it until some have finished.'
    )
  validation, test = sweep.part('validation'), sweep.part('test')
  mean = lambda cells, part: float(np.mean([c.loss(part) for c in cells]))
  names = labels(sweep)
  table = [
    Row(
      label=names[arm],
      arm=arm,
      cells=cells,
      rate=cells[0].axes['learning_rate'],
      at_edge=_at_edge(sweep, cells[0]),
      clipped=_clipped(cells, clip_norm(sweep)),
      validation=mean(cells, validation),
      test=mean(cells, test),
    )
    for arm, cells in chosen.items()
  ]
  return sorted(table, key=lambda row: (row.parameters, row.label))


def paired(which: np.ndarray, *terms: tuple[float, list[Outcome]]) -> Estimate | None:
  """The mean of a weighted sum of losses, paired by seed and record.

      paired(test, (1, cells), (-1, others))    the mean of their difference

  Args:
    which: records [N] that count.
    terms: (weight, cells, one a seed). The base's cell has no seed and goes
      with each; seeds that a term lacks are left out.

  Returns:
    None where the terms have no seed in common.
  """
  by_seed = [{cell.axes.get('seed'): cell for cell in cells} for _, cells in terms]
  seeded = [cells for cells in by_seed if None not in cells]
  seeds = sorted(set.intersection(*map(set, seeded)))
  contrast = np.zeros((len(seeds), int(which.sum())))
  for (weight, _), cells in zip(terms, by_seed, strict=True):
    for i, seed in enumerate(seeds):
      contrast[i] += weight * cells[seed if seed in cells else None].last[0][which]
  return intervals.estimate(contrast, terms[0][1][0].last[1][which])


def families(sweep: Sweep) -> dict[Arm, list[Arm]]:
  """Other axes than rank → the arms planned with them, largest rank first.

  Ranks that the base cannot have were refused before anything was trained:
  they are left out.
  """
  arms: dict[Arm, list[Arm]] = {}
  for cell in sweep.cells:
    if cell.kind == 'lora' and cell.entry['trainable_parameters']:
      family = arms.setdefault(others(cell.arm), [])
      if cell.arm not in family:
        family.append(cell.arm)
  return {family: sorted(each, key=lambda arm: -dict(arm)['rank']) for family, each in arms.items()}


def lost_seeds(sweep: Sweep, row: Row) -> list[int]:
  """Planned seeds without a result at the chosen rate: they failed there."""
  planned = {
    cell.axes['seed'] for cell in sweep.cells if (cell.kind, cell.arm) == ('lora', row.arm)
  }
  return sorted(planned - {cell.axes['seed'] for cell in row.cells})


def others(arm: Arm) -> Arm:
  """An arm without its rank."""
  return tuple(item for item in arm if item[0] != 'rank')


def labels(sweep: Sweep) -> dict[Arm, str]:
  """Of all planned arms: 'rank 4', or 'qv, rank 4' where targets vary too."""
  planned = [arm for family in families(sweep).values() for arm in family]
  values: dict[str, set[Any]] = {}
  for name, value in itertools.chain(*planned):
    values.setdefault(name, set()).add(value)
  varying = [n for n in sorted(values) if len(values[n]) > 1 and n != 'rank']
  return {
    arm: ', '.join([*(str(dict(arm)[n]) for n in varying), f'rank {dict(arm)["rank"]}'])
    for arm in planned
  }


def clip_norm(sweep: Sweep) -> float:
  """The bound of the gradient's norm; 0 where nothing is clipped."""
  return sweep.manifest['config']['optimizer']['clip_norm']


def _at_edge(sweep: Sweep, chosen: Outcome) -> bool:
  tried = {
    cell.axes['learning_rate']
    for cell in sweep.cells
    if (cell.kind, cell.arm) == (chosen.kind, chosen.arm) and cell.has_ended
  }
  return chosen.axes['learning_rate'] in (min(tried), max(tried))


def _clipped(cells: list[Outcome], bound: float) -> float | None:
  shares = [cell.clipped(bound) for cell in cells]
  known = [share for share in shares if share is not None]
  return float(np.mean(known)) if known else None
