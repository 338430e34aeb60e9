"""Writes a folder so that it appears whole or not at all."""

from collections.abc import Callable, Iterator
import contextlib
import errno
import os
from pathlib import Path
import random
import tempfile
import time

from gemma_jax import files, temporary

# Two writers that begin at the same moment both step back and try again.
_ATTEMPTS, _PAUSE_SECS = 4, 0.05


def replace(folder: str | os.PathLike, fill: Callable[[Path], None]):
  """Makes a folder appear whole: fill a sibling, flush it, rename it.

  A folder that it replaces is moved aside first and removed last, so a whole
  one is on disk at any time; if a process died between the two renames, the
  next call puts the old one back before it starts.

  An object store has no folders to rename: there each file is uploaded whole, the
  weights before the config.json that describes them, and files of an older folder
  are removed last.

  Args:
    folder: to be made or replaced.
    fill: writes files into the empty folder that it is given.

  Raises:
    BlockingIOError: another process of this machine is writing it.
    OSError: or whatever `fill` raises; `folder` is then unchanged.
  """
  if files.is_remote(folder):
    with tempfile.TemporaryDirectory() as new:
      fill(Path(new))
      files.put_folder(Path(new), folder)
      files.remove_others(Path(new), folder)
    return
  folder = Path(folder).absolute()
  folder.parent.mkdir(parents=True, exist_ok=True)
  with _only_writer(folder) as new:
    _recover(folder)
    fill(new.path)
    for path in (*new.path.rglob('*'), new.path):
      _flush(path)
    old = temporary.name(folder, temporary.OLD)
    try:
      if os.path.lexists(folder):
        os.rename(folder, old)
      new.publish(folder)
    finally:
      if os.path.lexists(old) and not os.path.lexists(folder):
        os.rename(old, folder)
    _flush(folder.parent)
    if os.path.lexists(old):
      _discard(old, folder)


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[temporary.Folder]:
  """Yields a temporary folder, if no other process has one for the same name."""
  for _ in range(_ATTEMPTS):
    with temporary.folder(folder) as new:
      if not temporary.remove_leftovers(folder, temporary.NEW, new.path):
        yield new
        return
    time.sleep(random.uniform(0, _PAUSE_SECS))
  raise BlockingIOError(errno.EWOULDBLOCK, 'another process is writing it', str(folder))


def _recover(folder: Path) -> None:
  """Puts back what a killed writer had moved aside, or removes it."""
  moved = temporary.siblings(folder, temporary.OLD)
  if moved and not os.path.lexists(folder):
    os.rename(moved.pop(), folder)
  for path in moved:
    _discard(path, folder)


def _discard(old: Path, folder: Path) -> None:
  """Removes a folder that was replaced.

  It is renamed to look like one that is being filled: if this process dies before
  all of it is gone, the rest is not put back.
  """
  rest = temporary.name(folder, temporary.NEW)
  with contextlib.suppress(OSError):
    os.rename(old, rest)
    temporary.remove(rest)


def _flush(path: Path):
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
