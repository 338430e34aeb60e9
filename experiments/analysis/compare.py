"""Arms of a sweep against the best one: which rank is enough, and how sure?

Rates and the best arm are chosen on the validation records, differences are
measured on the test records, so that no choice flatters what is reported.
"""

import dataclasses
from typing import Any

import numpy as np

from experiments.analysis import intervals
from experiments.analysis.intervals import Interval
from gemma_jax.sweep.results import Arm, Outcome, Sweep

ALPHA = 0.05


@dataclasses.dataclass(frozen=True)
class Row:
  """An arm at its own best rate.

  Attributes:
    label: 'rank 4', with the other axes that vary.
    arm: its axes.
    cells: one a seed.
    rate: the learning rate that validation chose.
    validation: mean loss over seeds, nats per token.
    test: the same on the test records.
    difference: test loss minus that of the best arm.
    p_adjusted: that the difference is 0, corrected for the number of arms.
  """

  label: str
  arm: dict[str, Any]
  cells: list[Outcome]
  rate: float
  validation: float
  test: float
  difference: Interval
  p_adjusted: float

  @property
  def parameters(self) -> int:
    """Trainable ones."""
    return self.cells[0].entry['trainable_parameters']

  @property
  def seconds(self) -> float:
    """Of training, mean over seeds."""
    return float(np.mean([cell.result['seconds'] for cell in self.cells]))

  @property
  def is_worse(self) -> bool:
    """Whether its loss is above the best arm's, at 5 %."""
    return self.p_adjusted < ALPHA and self.difference.mean > 0


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
  best = min(chosen, key=lambda arm: mean(chosen[arm], validation))
  others = {
    arm: difference(cells, chosen[best], test)
    for arm, cells in chosen.items()
    if arm != best
  }
  adjusted = dict(
    zip(others, intervals.adjust([d.p for d in others.values()]), strict=True)
  )
  varying = _varying(list(chosen))
  found = [
    Row(
      label=label(arm, varying),
      arm=dict(arm),
      cells=cells,
      rate=cells[0].axes['learning_rate'],
      validation=mean(cells, validation),
      test=mean(cells, test),
      difference=others.get(arm, Interval(0.0, 0.0, 0.0, 1.0)),
      p_adjusted=float(adjusted.get(arm, 1.0)),
    )
    for arm, cells in chosen.items()
  ]
  return sorted(found, key=lambda row: (row.parameters, row.label))


def difference(
  cells: list[Outcome], others: list[Outcome], which: np.ndarray
) -> Interval:
  """Paired by seed and record; seeds that only one side has are left out."""
  by_seed = {cell.axes['seed']: cell for cell in others}
  pairs = [
    (cell, by_seed[cell.axes['seed']])
    for cell in cells
    if cell.axes['seed'] in by_seed
  ]
  if not pairs:
    return Interval(float('nan'), float('nan'), float('nan'), 1.0)
  first, second = (
    np.stack([pair[i].last[0][which] for pair in pairs]) for i in (0, 1)
  )
  return intervals.paired(first, second, cells[0].last[1][which])


def best(table: list[Row]) -> Row:
  """The arm that validation prefers."""
  return min(table, key=lambda row: row.validation)


def enough(table: list[Row]) -> Row:
  """The arm of fewest parameters that is not told to be worse than the best."""
  return next(row for row in table if not row.is_worse)


def answer(sweep: Sweep, table: list[Row]) -> str:
  """The result of a sweep in words, with its interval and its limits."""
  top, small = best(table), enough(table)
  records, seeds = int(sweep.part('test').sum()), len(top.cells)
  if len(table) == 1:
    text = (
      f'Only {top.label} was trained: test loss {top.test:.4f} nats per token.'
    )
  elif small is top:
    text = (
      f'{_upper(top.label)} is the best, and every smaller one is '
      'distinguishably worse.'
      if top is not table[0]
      else f'{_upper(top.label)}, the smallest, is the best: more parameters '
      'brought nothing that can be measured here.'
    )
  else:
    d = small.difference
    text = (
      f'{_upper(small.label)} is enough: it is the smallest whose test loss '
      f'cannot be told from that of the best, {top.label}. It differs by '
      f'{d.mean:+.4f} nats per token, 95 % interval '
      f'[{d.low:+.4f}, {d.high:+.4f}], so it may be worse by up to '
      f'{max(d.high, 0):.4f}.'
    )
  worse = [row.label for row in table if row.is_worse]
  if worse:
    text += f' Distinguishably worse than the best: {", ".join(worse)}.'
  elif len(table) > 1:
    text += ' No arm parts from the best with this budget.'
  text += f' Measured on {records} test records and {seeds} seed(s).'
  if seeds < intervals.FEW_SEEDS:
    text += (
      f' With fewer than {intervals.FEW_SEEDS} seeds the spread over seeds is '
      'hardly known, and the intervals are too narrow rather than too wide.'
    )
  return text


def categories(sweep: Sweep, table: list[Row]) -> list[dict[str, Any]]:
  """Test loss of each arm by the records' category, against the best arm.

  Returns:
    Dicts of `category`, `records`, `label`, `test`, `difference` and
    `p_adjusted` (for all categories and arms together).
  """
  test = sweep.part('test')
  names = np.array([row['category'] for row in sweep.heldout])
  top, found = best(table), []
  for category in sorted(set(names[test]) - {''}):
    which = test & (names == category)
    for row in table:
      found.append(
        {
          'category': category,
          'records': int(which.sum()),
          'label': row.label,
          'test': float(np.mean([cell.loss(which) for cell in row.cells])),
          'difference': difference(row.cells, top.cells, which),
        }
      )
  others = [f for f in found if f['label'] != top.label]
  adjusted = intervals.adjust([f['difference'].p for f in others])
  for each in found:
    each['p_adjusted'] = 1.0
  for each, p in zip(others, adjusted, strict=True):
    each['p_adjusted'] = float(p)
  return found


def truncation(sweep: Sweep, table: list[Row]) -> list[dict[str, Any]]:
  """Test loss at each rank: trained there, and cut to it from the largest.

  Returns:
    Dicts of `label`, `others` (the label without its rank), `rank`,
    `from_rank`, `trained` and `truncated` (mean losses), and `difference`,
    truncated minus trained; by others, then by rank.
  """
  test = sweep.part('test')
  by_arm: dict[Arm, list[Outcome]] = {}
  for cell in sweep.finished('truncated'):
    by_arm.setdefault(cell.arm, []).append(cell)
  trained = {tuple(sorted(row.arm.items())): row for row in table}
  found = []
  for arm, cells in by_arm.items():
    own = tuple(item for item in arm if item[0] != 'from_rank')
    row = trained.get(own)
    if row is None:
      continue
    found.append(
      {
        'label': row.label,
        'others': row.label.removesuffix(f'rank {row.arm["rank"]}'),
        'rank': row.arm['rank'],
        'from_rank': dict(arm)['from_rank'],
        'trained': row.test,
        'truncated': float(np.mean([cell.loss(test) for cell in cells])),
        'difference': difference(cells, row.cells, test),
      }
    )
  return sorted(found, key=lambda each: (each['others'], each['rank']))


def label(arm: Arm, varying: set[str]) -> str:
  """'rank 4', or 'attention, keras, rank 4' where more than ranks vary."""
  settings = dict(arm)
  others = [str(settings[n]) for n in sorted(varying - {'rank'})]
  return ', '.join([*others, f'rank {settings["rank"]}'])


def _varying(arms: list[Arm]) -> set[str]:
  """Axes with more than one value."""
  values: dict[str, set[Any]] = {}
  for arm in arms:
    for name, value in arm:
      values.setdefault(name, set()).add(value)
  return {name for name, found in values.items() if len(found) > 1}


def _upper(text: str) -> str:
  return text[:1].upper() + text[1:]
