"""One flipped bit, a cut, a removal, in every file of a checkpoint."""

import collections
import contextlib
from pathlib import Path
import shutil

import numpy as np

from gemma_jax.runs.checkpoint import Checkpoints
from tests.faults import runs as runs_lib


def damage(runs: runs_lib.Runs, trials: int, rng: np.random.Generator):
  """Damages the newest step of a copied workdir, file by file.

  Args:
    runs: whose undisturbed workdir is copied.
    trials: damages, spread evenly over files and kinds.
    rng: of the places.

  Returns:
    What was counted, by name.
  """
  found = collections.Counter()
  root = runs.folder / 'undisturbed' / 'checkpoints'
  newest = runs_lib.newest_step(runs.folder / 'undisturbed')
  older = min(int(p.name) for p in root.iterdir())
  files = sorted(p for p in (root / str(newest)).rglob('*') if p.is_file())
  found['kinds of files'] = len(files)
  for trial in range(trials):
    file = files[trial % len(files)]
    kind = ('flip', 'cut', 'remove')[trial // len(files) % 3]
    workdir = runs.folder / 'damaged'
    shutil.copytree(root, workdir / 'checkpoints')
    _apply(kind, workdir / 'checkpoints' / file.relative_to(root), rng, found)
    with contextlib.closing(Checkpoints(str(workdir))) as checkpoints:
      step = checkpoints.latest_step()
      checkpoints.read_notes(step)
    found['damages'] += 1
    found['detected, newest good step used'] += step == older
    found['damaged step kept aside'] += (workdir / 'checkpoints' / f'{newest}.set_aside').exists()
    shutil.rmtree(workdir)
  return found


def _apply(kind: str, path: Path, rng: np.random.Generator, found) -> None:
  content = bytearray(path.read_bytes())
  if kind == 'flip':
    bit = int(rng.integers(8 * len(content)))
    content[bit // 8] ^= 1 << bit % 8
  if kind == 'cut':
    del content[int(rng.integers(len(content))) :]
  found[kind] += 1
  if kind == 'remove':
    path.unlink()
  else:
    path.write_bytes(content)
