"""A disk that is full at a random byte, read-only, or gone."""

import collections
from collections.abc import Iterator
import contextlib
from pathlib import Path
import shutil
import subprocess

from absl import logging
import numpy as np

from tests.faults import runs as runs_lib


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
  """A tmpfs of that size; needs the right to mount."""
  folder.mkdir(parents=True)
  _run('mount', '-t', 'tmpfs', '-o', f'size={size_bytes}', 'tmpfs', folder)
  try:
    yield folder
  finally:
    _run('umount', '--lazy', folder)


def resize(disk: Path, size_bytes: int) -> None:
  """Makes room, or takes it."""
  remount(disk, f'size={size_bytes}')


def remount(disk: Path, option: str) -> None:
  """Changes an option of the disk: ro, rw."""
  _run('mount', '-o', f'remount,{option}', disk)


def can_mount() -> bool:
  """Whether this process may make a small disk."""
  return shutil.which('mount') is not None and (
    subprocess.run(['unshare', '--mount', 'true'], capture_output=True, check=False).returncode == 0
  )


def full(runs: runs_lib.Runs, trials: int, rng: np.random.Generator):
  """Fills the disk at a random byte, makes room, and runs the command again.

  Args:
    runs: to disturb.
    trials: disks that a run fills.
    rng: of their sizes, uniform up to what an undisturbed run leaves; one that
      proves large enough is not counted among the disks.

  Returns:
    What was counted, by name.
  """
  found = collections.Counter()
  needed = sum(p.stat().st_size + 4096 for p in (runs.folder / 'undisturbed').rglob('*'))
  while found['disks'] < trials:
    size = int(rng.uniform(8192, needed))
    with small_disk(runs.folder / f'disk{size}', size) as disk:
      workdir = disk / 'run'
      log = runs.folder / f'disk{size}.log'
      code, text = runs.finish(workdir, log)
      if code == 0:
        found['large enough'] += 1
        continue
      found['disks'] += 1
      found[f'exits with {code}'] += 1
      errors = [x for x in text.splitlines() if x.startswith('error: ')]
      found['one line that says so'] += len(errors) == 1 and 'No space left' in errors[0]
      if 'Traceback' in text:
        found['tracebacks'] += 1
        logging.error('A disk of %d bytes:\n%s', size, text)
      adapter = runs_lib.adapter_bytes(workdir)
      found['half-written adapters'] += adapter not in (None, runs.adapter)
      step = runs_lib.newest_step(workdir)
      resize(disk, 4 * needed)
      code, text = runs.finish(workdir, log)
      found['previous step used'] += step == 0 or f'Resumed from step {step} of' in text
      found['bit-equal adapters'] += code == 0 and runs.is_equal(workdir)
  return found


def _run(*command) -> None:
  subprocess.run([str(part) for part in command], check=True)
