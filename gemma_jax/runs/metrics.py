"""Metrics with units in their names: JSON Lines and TensorBoard.

`metrics.jsonl` has a line for every update and one more for every evaluation,
including the base's at step 0:

    {"step": 7, "loss_nats_per_token": 2.31, "learning_rate": 5e-05, ...}
    {"step": 10, "eval_loss_nats_per_token": 2.27, "eval_tokens": 4113, ...}
"""

import os
from pathlib import Path
import tempfile
import time
from typing import Any

from absl import logging

from gemma_jax import files
from gemma_jax.runs import hosts

_UPLOAD_EVERY_SECS = 60
_FLUSH_EVERY_SECS = 10


class MetricsWriter:
  """Appends to metrics.jsonl and to TensorBoard files under a workdir.

  A resumed run first drops whatever came after its checkpoint, and a line that a
  crash left incomplete, so that the file reads as if nothing had happened.

  An object store cannot append: there the files grow in a local folder, and are
  uploaded whole every minute and at each `flush`.

  Attributes:
    folder: where files are written, the workdir itself if it is local.
  """

  def __init__(self, workdir: str, finished_steps: int):
    self._remote = workdir if files.is_remote(workdir) else None
    self._scratch = tempfile.TemporaryDirectory() if self._remote else None
    self.folder = Path(self._scratch.name if self._scratch else workdir)
    self._uploaded = 0.0
    rows, stray = _read(files.path(workdir) / 'metrics.jsonl')
    if stray:
      aside = files.path(workdir) / 'metrics.jsonl.set_aside'
      before = aside.read_bytes() if aside.is_file() else b''
      files.write(aside, before + b''.join(stray))
      logging.warning(
        '%s/metrics.jsonl: %d lines are no metrics; set aside in %s', workdir, len(stray), aside
      )
    path = self.folder / 'metrics.jsonl'
    # A run that begins anew evaluates the base again.
    files.write_json_lines(path, [row for row in rows if row['step'] <= finished_steps > 0])
    # The file just written: a link in its place is not followed.
    flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW
    self._file = os.fdopen(os.open(path, flags), 'a', encoding='utf-8')
    self._board = _Board(self.folder / 'tensorboard', finished_steps + 1 if finished_steps else 0)

  def write(self, step: int, values: dict[str, Any]) -> None:
    """Writes one line.

    Args:
      step: finished updates.
      values: finite numbers; a skipped update lacks the others.
    """
    values = {k: _plain(v) for k, v in values.items()}
    line = files.to_json({'step': step, **values}, f'metrics.jsonl, step {step}')
    self._file.write(line + '\n')
    self._file.flush()
    self._board.write(
      step,
      {
        f'{"eval" if name.startswith("eval_") else "train"}/{name}': value
        for name, value in values.items()
      },
    )
    if self._remote and time.time() - self._uploaded > _UPLOAD_EVERY_SECS:
      self.flush()

  def flush(self) -> None:
    """Brings everything written so far into the workdir."""
    self._board.flush()
    if self._remote:
      started = time.time() - 1.0  # clocks of file systems lag a little
      files.put_folder(self.folder, self._remote, newer_than=self._uploaded)
      self._uploaded = started

  def close(self) -> None:
    """Flushes both."""
    self._file.close()
    self.flush()
    self._board.close()
    if self._scratch:
      self._scratch.cleanup()


class NullWriter:
  """The writer of the processes that do not lead; writes nothing."""

  folder = Path()

  def write(self, step: int, values: dict[str, Any]) -> None:
    """Writes nothing."""

  def flush(self) -> None:
    """There is nothing to flush."""

  def close(self) -> None:
    """There is nothing to close."""


def open_writer(workdir: str, finished_steps: int) -> MetricsWriter | NullWriter:
  """The run's metrics on the leading process; a `NullWriter` on the others."""
  if not hosts.is_lead():
    return NullWriter()
  return MetricsWriter(workdir, finished_steps)


class _Board:
  """TensorBoard's events, written synchronously.

  tensorboardX's own SummaryWriter writes in a thread; a full disk ends that
  thread, and the run then waits for it forever.
  """

  def __init__(self, folder: Path, first_step: int):
    """Starts a file whose events replace those from `first_step` on."""
    from tensorboardX import event_file_writer
    from tensorboardX.proto import event_pb2, summary_pb2

    folder.mkdir(parents=True, exist_ok=True)
    # Both modules create their classes on import.
    self._event, log = event_pb2.Event, event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]: see above
    self._summary = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]: see above
    self._writer = event_file_writer.EventsWriter(f'{folder}/events')
    self._put(step=first_step, session_log=log(status=log.START))
    self.flush()

  def write(self, step: int, values: dict[str, float]) -> None:
    scalars = [self._summary.Value(tag=tag, simple_value=x) for tag, x in values.items()]
    self._put(step=step, summary=self._summary(value=scalars))
    if time.monotonic() - self._flushed > _FLUSH_EVERY_SECS:
      self.flush()

  def flush(self) -> None:
    self._writer.flush()
    self._flushed = time.monotonic()

  def close(self) -> None:
    self._writer.close()

  def _put(self, **fields):
    self._writer.write_event(self._event(wall_time=time.time(), **fields))


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of a metrics.jsonl; torn and stray lines are left out."""
  return _read(path)[0]


def _read(path: str | os.PathLike) -> tuple[list[dict[str, Any]], list[bytes]]:
  """(rows, lines that are something else); a torn last line is neither."""
  rows, stray = [], []
  if not files.path(path).exists():
    return rows, stray
  for line in files.read_lines(path):
    try:
      row = files.parse_json(line)
    except ValueError:
      row = None
    if isinstance(row, dict) and type(row.get('step')) is int:
      rows.append(row)
    elif line.endswith(b'\n'):
      stray.append(line)
  return rows, stray


def peak_memory_bytes() -> int:
  """Largest resident memory of this process so far, in bytes."""
  import resource
  import sys

  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else peak * 1024


def _plain(value):
  return int(value) if isinstance(value, int) else float(value)
