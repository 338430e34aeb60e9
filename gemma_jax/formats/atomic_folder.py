"""Writes a folder so that it is there whole or not at all."""

from collections.abc import Callable, Iterator
import contextlib
import errno
import fcntl
import os
from pathlib import Path
import shutil
import tempfile

from gemma_jax import files


def replace(folder: str | os.PathLike, fill: Callable[[Path], None]):
  """Makes a folder appear whole: fill a sibling, flush it, rename it.

  A folder that it replaces is moved aside first and removed last, so a whole
  one is on disk at any time; if a process died between the two renames, the
  next call puts the old one back before it starts.

  An object store has no folders to rename: there each file is put whole, the
  weights before the config.json that describes them, and files of an older
  folder go last.

  Args:
    folder: to be made or replaced.
    fill: writes files into the empty folder that it is given.

  Raises:
    BlockingIOError: another process of this machine is writing it.
    OSError: or whatever `fill` raises; `folder` is then as it was.
  """
  if files.is_remote(folder):
    with tempfile.TemporaryDirectory() as new:
      fill(Path(new))
      files.put_folder(Path(new), folder)
      files.remove_others(Path(new), folder)
    return
  folder = Path(folder).absolute()
  new = folder.with_name(f'.{folder.name}.new')
  old = folder.with_name(f'.{folder.name}.old')
  folder.parent.mkdir(parents=True, exist_ok=True)
  with _empty_and_ours(new, folder):
    if old.exists() and not folder.exists():
      os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)
    try:
      fill(new)
      for path in (*new.rglob('*'), new):
        _flush(path)
      if folder.exists():
        os.rename(folder, old)
      os.rename(new, folder)
    finally:
      if old.exists() and not folder.exists():
        os.rename(old, folder)
      shutil.rmtree(new, ignore_errors=True)
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _empty_and_ours(new: Path, folder: Path) -> Iterator[None]:
  """Makes the folder `new`, locked against other processes.

  A lock ends with its process, so what a killed one left is taken over.
  """
  new.mkdir(exist_ok=True)
  descriptor = os.open(new, os.O_RDONLY)
  try:
    if not _lock(descriptor, new):
      raise BlockingIOError(
        errno.EWOULDBLOCK, 'another process is writing it', str(folder)
      )
    for leftover in new.iterdir():
      shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    yield
  finally:
    os.close(descriptor)


def _lock(descriptor: int, new: Path) -> bool:
  """Whether the folder is ours: locked, and still the one of that name."""
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:
    return True  # a file system without locks
  try:
    return os.path.samestat(os.fstat(descriptor), new.stat())
  except FileNotFoundError:
    return False  # renamed by the process that had the lock


def _flush(path: Path):
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
