"""Mutated inputs by the ten thousand, in processes that may die."""

import collections
import json
import os
from pathlib import Path
import subprocess
import sys
import time

from tests.faults import corpora

ROOT = Path(__file__).parents[2]
_BATCH = 10_000
_SILENT_SECS = 180


def fuzz(kind: str, trials: int, seed: int, folder: Path):
  """Reads mutated inputs of one format.

  Args:
    kind: a key of `corpora.CORPORA`.
    trials: inputs.
    seed: of the mutations; trial i is a function of (seed, i).
    folder: to work in, empty.

  Returns:
    (counts, problems): trials that were `read`, `refused` or `wrong`, with the
    largest peak of memory and the slowest; and what was wrong, in words.
  """
  valid = folder / 'valid'
  valid.mkdir(parents=True)
  corpora.CORPORA[kind].write(valid)
  counts, problems = collections.Counter(), []
  first, most = 0, {}
  while first < trials:
    last = min(first + _BATCH, trials)
    lines, code = _work(kind, seed, first, last, folder)
    for line in lines:
      if 'counts' in line:
        counts.update(line['counts'])
        most = {name: max(value, most.get(name, 0)) for name, value in line['most'].items()}
      else:
        problems.append(f'trial {line["trial"]}: {line["problem"]}')
    if code != 0:
      last = int((folder / 'progress').read_text()) + 1
      counts['wrong'] += 1
      counts['read or refused before a crash'] += last - first - 1
      problems.append(f'trial {last - 1}: the process ended with {code}')
    first = last
  counts['trials'] = trials
  counts.update(most)
  return counts, problems


def _work(kind, seed, first, last, folder):
  """The worker's lines and its exit code; one that hangs is killed."""
  (folder / 'progress').write_text(str(first))
  arguments = [str(a) for a in (kind, seed, first, last, folder)]
  with (folder / 'lines').open('w') as out, (folder / 'log').open('w') as log:
    process = subprocess.Popen(
      [sys.executable, '-m', 'tests.faults.worker', *arguments],
      cwd=ROOT,
      env=os.environ | {'JAX_PLATFORMS': 'cpu', 'TF_CPP_MIN_LOG_LEVEL': '3'},
      stdout=out,
      stderr=log,
    )
    while process.poll() is None:
      time.sleep(0.05)
      quiet = time.time() - (folder / 'progress').stat().st_mtime
      if quiet > _SILENT_SECS:
        process.kill()
        process.wait()
  for left in folder.glob('work*'):
    for path in sorted(left.rglob('*'), reverse=True):
      path.rmdir() if path.is_dir() else path.unlink()
    left.rmdir()
  text = (folder / 'lines').read_text()
  return [json.loads(line) for line in text.splitlines()], process.returncode
