"""Guards over the numbers of each update: not finite, or a sudden jump.

not finite    stops the run, with step, learning rate and records; or, up
              to `max_skipped_batches` times, the update is skipped (on the
              device: see `training.step`) and the run continues
a jump        gives a warning, with the records, and changes nothing
"""

import collections
from collections.abc import Callable
import math
import statistics
from typing import Any

from absl import logging

# A loss this many median absolute deviations above the median of the last ones is
# a jump; the noise of small batches stays far below.
_JUMP = 10.0
_LEAST_JUMP_NATS = 0.5
_WINDOW, _LEAST = 50, 20

_MOST_SHOWN = 16


class Guard:
  """Looks at each update of a run.

  Attributes:
    skipped: steps whose update was skipped, in order; may be shared with a
      checkpoint's notes.
  """

  def __init__(self, max_skipped: int, skipped: list[int], record_ids: Callable[[int], list[int]]):
    """Starts with no losses seen.

    Args:
      max_skipped: how many updates may be skipped.
      skipped: the steps skipped so far; grows.
      record_ids: a step → the training records in its batch.
    """
    self.skipped = skipped
    self._max_skipped = max_skipped
    self._record_ids = record_ids
    self._losses: collections.deque[float] = collections.deque(maxlen=_WINDOW)

  def check(self, step: int, values: dict[str, Any]) -> dict[str, Any]:
    """Stops, skips or warns.

    Args:
      step: finished updates, this one included.
      values: its metrics line; has `loss_nats_per_token`.

    Returns:
      The line to write; that of a skipped update lacks what is not finite and
      counts the `skipped_updates` so far.

    Raises:
      FloatingPointError: a value is not finite, and no more may be skipped.
    """
    finite = {k: v for k, v in values.items() if math.isfinite(v)}
    if len(finite) == len(values):
      self._warn_of_jump(step, values['loss_nats_per_token'])
      return values
    records = self._records(step)
    if len(self.skipped) >= self._max_skipped:
      remedy = 'lower optimizer.learning_rate or look at these records'
      if not self._max_skipped:
        remedy += '; max_skipped_batches skips such batches'
      check_finite(step, values, records, remedy)
    self.skipped.append(step)
    logging.warning(
      'Step %d: the loss or gradient is not finite (%s): the update is skipped, '
      'number %d of at most %d.',
      step,
      records,
      len(self.skipped),
      self._max_skipped,
    )
    return {**finite, 'skipped_updates': len(self.skipped)}

  def _warn_of_jump(self, step: int, loss: float) -> None:
    before = list(self._losses)
    self._losses.append(loss)
    if len(before) < _LEAST:
      return
    middle = statistics.median(before)
    spread = statistics.median(abs(x - middle) for x in before)
    if loss - middle > max(_JUMP * spread, _LEAST_JUMP_NATS):
      logging.warning(
        'Step %d: the loss jumped to %.3f nats/token from a median of %.3f (%s).',
        step,
        loss,
        middle,
        self._records(step),
      )

  def _records(self, step: int) -> str:
    ids = self._record_ids(step - 1)
    more = ', ...' if len(ids) > _MOST_SHOWN else ''
    return f'training records {", ".join(map(str, ids[:_MOST_SHOWN]))}{more}'


def check_finite(
  step: int,
  values: dict[str, Any],
  records: str = '',
  remedy: str = 'lower optimizer.learning_rate or look at the data',
) -> None:
  """Raises FloatingPointError that names the value, the step and the rate.

  Args:
    step: finished updates.
    values: by name.
    records: where the values come from, for the message.
    remedy: what to do about it.
  """
  for name, value in values.items():
    if not math.isfinite(value):
      where = [records] if records else []
      if 'learning_rate' in values:
        where.insert(0, f'learning rate {values["learning_rate"]:g}')
      raise FloatingPointError(
        f'{name}: got {value} at step {step}'
        + (f' ({"; ".join(where)})' if where else '')
        + f', expected a finite number. Nothing from this step was saved; '
        f'{remedy}.'
      )
