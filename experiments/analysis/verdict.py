"""Is a smaller rank enough? Ranks are tested from the largest down.

    deficit = loss of a rank - loss of the reference       on the test records
    gain    = loss of the base - loss of the reference
    a rank holds if the upper 95 % bound of  deficit - margin * gain  is below 0

The reference is a planned rank with the same other axes, whatever its loss; both
it (`grid.reference`, the largest if none is named) and the margin, a share, are
fixed in advance. One contrast of three losses, paired by seed and record, is
bounded, so that the gain's own error counts (as in clinical trials with a placebo
beside the reference: Pigeot et al., Statistics in Medicine 22, 2003), and only
once the gain itself is above 0.

Testing stops at the first rank that does not hold. With the order fixed in
advance, each test has the full level, and the chance that any rank is wrongly
called enough is still 5 % (Maurer, Hothorn and Lehmacher 1995): no smaller rank
changes what is said of a larger one. A rank that does not hold is not shown to be
too small either: it is undecided.

If other axes vary too, there is no verdict: one for each of their choices, each
at the full level, would be wrong somewhere more often than it claims. Nor is
there one if a seed failed: the seeds that are left are the lucky ones.
"""

import dataclasses

from experiments.analysis import arms, intervals
from experiments.analysis.arms import Row
from experiments.analysis.intervals import Estimate
from gemma_jax.sweep.results import Arm, Sweep

# At 30 records whose losses are skewed, 5 % may be 13 % (`intervals.estimate`),
# and with fewer it is more. Records count as an effective number of one length:
# the skew of a mean in which few records weigh the most is that of those few,
# however many others there are.
RECORDS_FOR_VERDICT = 30

HOLDS = 'holds'
FAILS = 'does not hold'
NOT_REACHED = 'not reached'
NOT_COMPARABLE = 'not comparable'


@dataclasses.dataclass(frozen=True)
class Test:
  """A rank against the reference.

  Attributes:
    label: of the arm.
    row: the arm, if some of it has finished.
    deficit: from the reference; None if no seed has both.
    excess: deficit - margin * gain, likewise; None without a base or margin.
    unsupported_reason: why the two cannot be compared, or ''.
    state: HOLDS, FAILS, NOT_REACHED (a larger rank did not hold),
      NOT_COMPARABLE, or '' if there is no verdict at all.
  """

  label: str
  row: Row | None
  deficit: Estimate | None
  excess: Estimate | None
  unsupported_reason: str
  state: str = ''

  @property
  def tested(self) -> Estimate:
    """`excess` of a rank that can be tested: one that no `unsupported_reason` speaks against."""
    assert self.excess is not None
    return self.excess


@dataclasses.dataclass(frozen=True)
class Answer:
  """The verdict on the ranks that share their other axes.

  Attributes:
    reference: label of that rank.
    row: that arm, if some of it has finished.
    margin: share of the gain.
    gain: of the reference over the base, or None.
    unsupported_reason: why there is no verdict, or ''.
    tests: of the smaller ranks, largest first.
  """

  reference: str
  row: Row | None
  margin: float | None
  gain: Estimate | None
  unsupported_reason: str
  tests: list[Test]

  @property
  def enough(self) -> Test | None:
    """The smallest rank that held before the stop."""
    held = [test for test in self.tests if test.state == HOLDS]
    return held[-1] if held else None

  @property
  def stop(self) -> Test | None:
    """The rank at which the sequence ended, if not all of them hold."""
    states = (FAILS, NOT_COMPARABLE)
    return next((t for t in self.tests if t.state in states), None)


def answers(sweep: Sweep, table: list[Row]) -> list[Answer]:
  """Returns one answer for each choice of the other axes.

  Args:
    sweep: with a finished adapter.
    table: of `arms.rows`.
  """
  by_arm, labels = {row.arm: row for row in table}, arms.labels(sweep)
  families = arms.families(sweep).values()
  made = [_answer(sweep, family, by_arm, labels) for family in families]
  if len(made) == 1:
    return made
  axes = arms.in_words(arms.varied(sweep))
  reason = f'adapters differ in {axes} too, and {len(made)} verdicts would each claim by itself'
  return [
    dataclasses.replace(
      answer,
      unsupported_reason=answer.unsupported_reason or reason,
      tests=[dataclasses.replace(test, state='') for test in answer.tests],
    )
    for answer in made
  ]


def states(answers: list[Answer]) -> dict[Arm, str]:
  """What the sequence of tests says of each arm."""
  by_arm = {}
  for answer in answers:
    if answer.row and answer.tests:
      by_arm[answer.row.arm] = 'reference'
    for test in answer.tests:
      if test.row:
        by_arm[test.row.arm] = test.state or 'no verdict'
  return by_arm


def _answer(
  sweep: Sweep, family: list[Arm], by_arm: dict[Arm, Row], labels: dict[Arm, str]
) -> Answer:
  grid = sweep.manifest['config']['grid']
  # Ranks above the reference are not compared with it.
  named = grid.get('reference') or dict(family[0])['rank']
  first, *smaller = [a for a in family if dict(a)['rank'] <= named] or family
  row, base = by_arm.get(first), sweep.finished('base')
  # A sweep whose manifest has no margin fixed none in advance.
  margin = grid.get('margin')
  which = sweep.part('test')
  gain = arms.paired(which, (1, base), (-1, row.trials)) if row and base else None
  tests = [_test(sweep, labels[arm], arm, by_arm.get(arm), row, base, margin) for arm in smaller]
  reason, name = '', arms.quoted(labels[first])
  if dict(first)['rank'] != named:
    reason = f'the reference, rank {named}, is not among its ranks'
  elif row is None or not sweep.has_ended(first):
    reason = f'the reference, {name}, has not finished'
  elif lost := arms.lost_seeds(sweep, row):
    reason = f'{len(lost)} of the seeds of the reference, {name}, failed'
  elif not base:
    reason = (
      'the base, from which the gain is measured, has no finished trial (there '
      'is none without "base" in grid.baselines)'
    )
  elif margin is None:
    reason = 'its manifest fixed no margin in advance'
  elif gain is None:
    reason = f'a loss of the base or of {name} is not finite'
  elif too_few := _too_few(gain):
    reason = too_few
  elif gain.upper(0.05) <= 0:
    reason = (
      f'the reference, {name}, has learnt nothing measurable: its gain over the base is not above 0'
    )
  return Answer(labels[first], row, margin, gain, reason, tests if reason else _sequence(tests))


def _test(
  sweep: Sweep,
  label: str,
  arm: Arm,
  row: Row | None,
  reference: Row | None,
  base: list,
  margin: float | None,
) -> Test:
  which = sweep.part('test')
  if row is None:
    return Test(label, None, None, None, 'no trial of it has finished')
  if reference is None:
    return Test(label, row, None, None, 'the reference has not finished')
  deficit = arms.paired(which, (1, row.trials), (-1, reference.trials))
  excess = None
  if base and margin is not None:
    excess = arms.paired(which, (1, row.trials), (margin - 1, reference.trials), (-margin, base))
  reason = ''
  if not sweep.has_ended(arm):
    reason = 'not all of its trials have ended'
  elif lost := arms.lost_seeds(sweep, row):
    reason = f'{len(lost)} of its seeds failed, and those left are not a fair sample'
  elif deficit is None:
    reason = 'it has no seed in common with the reference'
  elif excess is not None:
    reason = _too_few(excess)
  return Test(label, row, deficit, excess, reason)


def _sequence(tests: list[Test]) -> list[Test]:
  """Their states, from the largest rank down."""
  decided, is_open = [], True
  for test in tests:
    state = NOT_REACHED
    if is_open:
      state = NOT_COMPARABLE
      if not test.unsupported_reason:
        state = HOLDS if test.tested.upper() < 0 else FAILS
      is_open = state == HOLDS
    decided.append(dataclasses.replace(test, state=state))
  return decided


def _too_few(estimate: Estimate) -> str:
  """Why no verdict rests on an estimate, or ''."""
  if estimate.seeds < intervals.FEWEST_SEEDS:
    return (
      f'{estimate.seeds} of its seeds can be compared, expected at least {intervals.FEWEST_SEEDS}'
    )
  if estimate.effective < RECORDS_FOR_VERDICT:
    return (
      f'the {estimate.records} test records count as {estimate.effective:.1f} '
      f'(long ones weigh more), expected at least {RECORDS_FOR_VERDICT}'
    )
  return ''
