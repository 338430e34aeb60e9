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
    trials: one per seed.
    rate: the learning rate that validation chose.
    at_edge: whether that is the lowest or the highest rate tried, so that a
      better one may lie beyond.
    clipped: share of the updates whose gradient was clipped, mean over seeds;
      None if clipping is off.
    validation: mean loss over seeds, nats per token.
    test: the same on the test records.
  """

  label: str
  arm: Arm
  trials: list[Outcome]
  rate: float
  at_edge: bool
  clipped: float | None
  validation: float
  test: float

  @property
  def rank(self) -> int:
    """Rank of the adapters."""
    return dict(self.arm)['rank']

  @property
  def parameters(self) -> int:
    """Trainable ones."""
    return self.trials[0].entry['trainable_parameters']

  @property
  def seconds(self) -> float:
    """Seconds of training, mean over seeds."""
    return float(np.mean([trial.seconds for trial in self.trials]))


def rows(sweep: Sweep) -> list[Row]:
  """Returns all arms with a finished trial, fewest parameters first.

  Raises:
    ValueError: no adapter has been trained to completion.
  """
  chosen = sweep.chosen()
  if not chosen:
    raise ValueError(
      f'{sweep.folder}: got no finished trial with an adapter, expected at '
      'least one. Run launch.sweep on it until some have finished.'
    )
  validation, test = sweep.part('validation'), sweep.part('test')
  mean = lambda trials, part: float(np.mean([trial.loss(part) for trial in trials]))
  names = labels(sweep)
  table = [
    Row(
      label=names[arm],
      arm=arm,
      trials=trials,
      rate=trials[0].axes['learning_rate'],
      at_edge=_at_edge(sweep, trials[0]),
      clipped=_clipped(trials, clip_norm(sweep)),
      validation=mean(trials, validation),
      test=mean(trials, test),
    )
    for arm, trials in chosen.items()
  ]
  return sorted(table, key=lambda row: (row.parameters, row.label))


def paired(which: np.ndarray, *terms: tuple[float, list[Outcome]]) -> Estimate | None:
  """The mean of a weighted sum of losses, paired by seed and record.

      paired(test, (1, trials), (-1, others))    the mean of their difference

  Args:
    which: records [N] that count.
    terms: (weight, trials), one trial per seed. The base's trial has no seed and
      is paired with each; seeds that a term lacks are left out.

  Returns:
    The estimate, or None if the terms have no seed in common.
  """
  by_seed = [{trial.axes.get('seed'): trial for trial in trials} for _, trials in terms]
  seeded = [trials for trials in by_seed if None not in trials]
  seeds = sorted(set.intersection(*map(set, seeded)))
  contrast = np.zeros((len(seeds), int(which.sum())))
  for (weight, _), trials in zip(terms, by_seed, strict=True):
    for i, seed in enumerate(seeds):
      contrast[i] += weight * trials[seed if seed in trials else None].last[0][which]
  return intervals.estimate(contrast, terms[0][1][0].last[1][which])


def families(sweep: Sweep) -> dict[Arm, list[Arm]]:
  """Axes other than rank → the arms planned with them, largest rank first.

  Ranks that the base cannot have were rejected before anything was trained and
  are left out.
  """
  arms: dict[Arm, list[Arm]] = {}
  for trial in sweep.trials:
    if trial.kind == 'lora' and trial.entry['trainable_parameters']:
      family = arms.setdefault(others(trial.arm), [])
      if trial.arm not in family:
        family.append(trial.arm)
  return {family: sorted(each, key=lambda arm: -dict(arm)['rank']) for family, each in arms.items()}


def lost_seeds(sweep: Sweep, row: Row) -> list[int]:
  """Returns the planned seeds without a result at the chosen rate: they failed there."""
  planned = {
    trial.axes['seed'] for trial in sweep.trials if (trial.kind, trial.arm) == ('lora', row.arm)
  }
  return sorted(planned - {trial.axes['seed'] for trial in row.trials})


def others(arm: Arm) -> Arm:
  """An arm without its rank."""
  return tuple(item for item in arm if item[0] != 'rank')


def labels(sweep: Sweep) -> dict[Arm, str]:
  """Labels of all planned arms: 'rank 4', or 'qv, rank 4' if targets vary too."""
  varying = varied(sweep)
  return {
    arm: ', '.join([*(str(dict(arm)[n]) for n in varying), f'rank {dict(arm)["rank"]}'])
    for arm in itertools.chain(*families(sweep).values())
  }


def varied(sweep: Sweep) -> list[str]:
  """Axes other than the rank of which more than one value is planned: ['scale_rule']."""
  values: dict[str, set[Any]] = {}
  for name, value in itertools.chain(*families(sweep)):
    values.setdefault(name, set()).add(value)
  return sorted(name for name in values if len(values[name]) > 1)


def in_words(axes: list[str]) -> str:
  """['init', 'scale_rule'] → 'init and scale rule'."""
  return ' and '.join(', '.join(axes).replace('_', ' ').rsplit(', ', 1))


def quoted(label: str) -> str:
  """A label as it stands in a sentence: in quotes if other axes are part of it."""
  return f'"{label}"' if ', ' in label else label


def clip_norm(sweep: Sweep) -> float:
  """The bound of the gradient's norm; 0 if gradients are not clipped."""
  return sweep.manifest['config']['optimizer']['clip_norm']


def _at_edge(sweep: Sweep, chosen: Outcome) -> bool:
  tried = {
    trial.axes['learning_rate']
    for trial in sweep.trials
    if (trial.kind, trial.arm) == (chosen.kind, chosen.arm) and trial.has_ended
  }
  return chosen.axes['learning_rate'] in (min(tried), max(tried))


def _clipped(trials: list[Outcome], bound: float) -> float | None:
  shares = [trial.clipped(bound) for trial in trials]
  known = [share for share in shares if share is not None]
  return float(np.mean(known)) if known else None
