"""Metrics with units in their names: JSON Lines and TensorBoard.

`metrics.jsonl` has a line for every update and one more for every evaluation,
that of the base at step 0 included:

    {"step": 7, "loss_nats_per_token": 2.31, "learning_rate": 5e-05, ...}
    {"step": 10, "eval_loss_nats_per_token": 2.27, "eval_tokens": 4113, ...}
"""

import json
import math
import os
from pathlib import Path
from typing import Any


class MetricsWriter:
  """Appends to metrics.jsonl and to TensorBoard files under a workdir.

  A resumed run first drops what came after its checkpoint, and a line that a
  crash left torn, so that the file reads as if nothing had happened.
  """

  def __init__(self, workdir: str, finished_steps: int):
    from tensorboardX import SummaryWriter

    path = Path(workdir) / 'metrics.jsonl'
    # A run that begins anew evaluates the base again.
    kept = [row for row in read(path) if row['step'] <= finished_steps > 0]
    temporary = path.with_suffix('.tmp')
    temporary.write_text(''.join(json.dumps(row) + '\n' for row in kept))
    os.replace(temporary, path)
    self._file = path.open('a')
    self._board = SummaryWriter(
      str(Path(workdir) / 'tensorboard'),
      purge_step=finished_steps + 1 if finished_steps else 0,
    )

  def write(self, step: int, values: dict[str, Any]) -> None:
    """Writes one line; values are numbers, `step` the finished updates."""
    values = {k: _plain(v) for k, v in values.items()}
    self._file.write(json.dumps({'step': step, **values}) + '\n')
    self._file.flush()
    for name, value in values.items():
      group = 'eval' if name.startswith('eval_') else 'train'
      self._board.add_scalar(f'{group}/{name}', value, step)

  def close(self) -> None:
    """Flushes both."""
    self._file.close()
    self._board.close()


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of a metrics.jsonl; a torn last line is left out."""
  path = Path(path)
  if not path.exists():
    return []
  rows = []
  for line in path.read_text().splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows


def check_finite(step: int, values: dict[str, Any]) -> None:
  """Raises FloatingPointError that names the step and the rate."""
  for name, value in values.items():
    if not math.isfinite(value):
      rate = values.get('learning_rate')
      raise FloatingPointError(
        f'{name}: got {value} at step {step}'
        + (f' (learning rate {rate:g})' if rate is not None else '')
        + ', expected a finite number. Nothing of this step was saved; lower '
        'optimizer.learning_rate or look at the data of this step.'
      )


def peak_memory_bytes() -> int:
  """Largest resident memory of this process so far, in bytes."""
  import resource
  import sys

  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else peak * 1024


def _plain(value):
  return int(value) if isinstance(value, int) else float(value)
