"""Writes a folder so that it is there whole or not at all."""

from collections.abc import Callable
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
    folder: to be made or replaced; one process writes it at a time.
    fill: writes files into the empty folder that it is given.

  Raises:
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
  if old.exists() and not folder.exists():
    os.rename(old, folder)
  for leftover in (new, old):
    shutil.rmtree(leftover, ignore_errors=True)
  try:
    new.mkdir()
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


def _flush(path: Path):
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
