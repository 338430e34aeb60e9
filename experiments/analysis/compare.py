"""Arms side by side, for exploration: pairs, categories, truncated adapters.

None of these is a verdict (`verdict`).
"""

import itertools
from typing import Any, NamedTuple

import numpy as np

from experiments.analysis import arms, intervals
from experiments.analysis.arms import Row
from experiments.analysis.intervals import Estimate
from experiments.analysis.verdict import Answer
from gemma_jax.runs.evaluate import FEWEST_RECORDS
from gemma_jax.sweep.results import Arm, Outcome, Sweep


class Pair(NamedTuple):
  """Two arms that differ in axes other than the rank.

  Attributes:
    first: an arm.
    second: the arm that its loss is compared with.
    difference: first minus second; None if no seed has both.
    p: p-value that it is 0, corrected for all pairs by Holm's method; None if the
      difference has no p-value.
  """

  first: Row
  second: Row
  difference: Estimate | None
  p: float | None


def pairs(sweep: Sweep, table: list[Row]) -> list[Pair]:
  """All pairs of arms at the same rank, or at the same budget.

  With `equal_parameters` a budget means a different rank for each target set: the
  smallest ranks are paired, then the next, and so on.
  """
  budget = {
    arm: i for family in arms.families(sweep).values() for i, arm in enumerate(reversed(family))
  }
  compared = [
    (a, b, arms.paired(sweep.part('test'), (1, a.trials), (-1, b.trials)))
    for a, b in itertools.combinations(table, 2)
    if budget[a.arm] == budget[b.arm]
  ]
  known = [d.p for *_, d in compared if d is not None and d.p is not None]
  corrected = iter(intervals.holm(known).tolist())
  return [
    Pair(a, b, d, None if d is None or d.p is None else next(corrected)) for a, b, d in compared
  ]


def categories(sweep: Sweep, table: list[Row], answers: list[Answer]) -> list[dict[str, Any]]:
  """Test loss of each arm by the records' category.

  Categories of fewer than 10 records are pooled.

  Returns:
    Dicts of `category`, `records`, `label`, `test`, and `deficit` (from the
    arm's reference; None for the reference itself).
  """
  test = sweep.part('test')
  names = np.array([row['category'] or 'none' for row in sweep.heldout])
  sizes = {name: int((test & (names == name)).sum()) for name in names[test]}
  if set(sizes) <= {'none'}:
    return []
  small = sorted(name for name in sizes if sizes[name] < FEWEST_RECORDS)
  groups = {name: [name] for name in sorted(sizes) if name not in small}
  if small:
    plural = 'category' if len(small) == 1 else 'categories'
    groups[f'other, {len(small)} {plural}'] = small
  references = {
    smaller.row.arm: answer.row
    for answer in answers
    for smaller in answer.tests
    if smaller.row and answer.row
  }
  lines = []
  for name, members in groups.items():
    which = test & np.isin(names, members)
    for row in table:
      reference = references.get(row.arm)
      lines.append(
        {
          'category': name,
          'records': int(which.sum()),
          'label': row.label,
          'test': float(np.mean([trial.loss(which) for trial in row.trials])),
          'deficit': reference and arms.paired(which, (1, row.trials), (-1, reference.trials)),
        }
      )
  return lines


def truncation(sweep: Sweep, table: list[Row]) -> list[dict[str, Any]]:
  """Test loss at each rank: trained at it, and truncated to it from the largest.

  Returns:
    Dicts of `label`, `others` (the label without its rank), `rank`,
    `from_rank`, `trained` and `truncated` (mean losses), and `difference`,
    truncated minus trained; by others, then by rank.
  """
  test = sweep.part('test')
  by_arm: dict[Arm, list[Outcome]] = {}
  for trial in sweep.finished('truncated'):
    by_arm.setdefault(trial.arm, []).append(trial)
  trained = {row.arm: row for row in table}
  lines = []
  for arm, trials in by_arm.items():
    own = tuple(item for item in arm if item[0] != 'from_rank')
    row = trained.get(own)
    if row is None:
      continue
    lines.append(
      {
        'label': row.label,
        'others': row.label.removesuffix(f'rank {row.rank}'),
        'rank': row.rank,
        'from_rank': dict(arm)['from_rank'],
        'trained': row.test,
        'truncated': float(np.mean([trial.loss(test) for trial in trials])),
        'difference': arms.paired(test, (1, trials), (-1, row.trials)),
      }
    )
  return sorted(lines, key=lambda each: (each['others'], each['rank']))
