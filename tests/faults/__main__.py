"""Disturbs runs and counts what became of them.

  python -m tests.faults --trials=60 [--seed=0] [--only=kill,stop]
                         [--inputs=20000] [--folder=DIR]

Prints a line of JSON for each test; exit code 1 if a promise was broken.
"""

import argparse
import json
from pathlib import Path
import sys
import tempfile
import time

import numpy as np

from tests.faults import corpora, damage, disks, fuzz, runs, several, signals


def _is_whole(n) -> bool:
  """Every disturbed run ended as the undisturbed one, and nothing was lost."""
  is_equal = n['bit-equal adapters'] == n['whole metrics'] == n['runs']
  return is_equal and not n['steps lost'] + n['resumed elsewhere']


# What must be, as a function of the counts.
_PROMISES = {
  'kill': lambda n: _is_whole(n) and n['exits with -9'] == n['signals'],
  'stop': lambda n: (
    _is_whole(n)
    and n['exits with 75'] == n['named the step saved']
    and n['exits with 75'] + n['exits with -15'] == n['signals']
    and n['exits with -15'] <= n['while starting'] + n['while ending']
  ),
  'damage': lambda n: n['detected, newest good step used'] == n['damages'],
  'several': lambda n: n['bit-equal adapters'] == n['ended'] == n['disturbed'],
  'disk': lambda n: (
    n['bit-equal adapters'] == n['previous step used'] == n['disks']
    and not n['half-written adapters'] + n['tracebacks']
  ),
}
_RUNS = {
  'kill': signals.kill,
  'stop': signals.stop,
  'damage': damage.damage,
  'disk': disks.full,
  'several': several.several,
}
# Two processes take minutes each time.
_DEFAULT = ','.join(name for name in (*_RUNS, *corpora.CORPORA) if name != 'several')


def main() -> int:
  """Parses the flags, runs the tests and prints what they counted."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--trials', type=int, default=60)
  parser.add_argument('--inputs', type=int, default=0)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--only', default=_DEFAULT)
  parser.add_argument('--folder', type=Path, default=None)
  flags = parser.parse_args()
  names = flags.only.split(',')
  is_kept, made = True, {}
  with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
    folder = Path(folder)
    for i, name in enumerate(names):
      started = time.monotonic()
      problems = []
      if name in _RUNS:
        rng = np.random.default_rng([flags.seed, i])
        processes = 2 if name == 'several' else 1
        if processes not in made:
          made[processes] = runs.Runs(folder / f'runs{processes}', processes)
        counts = _RUNS[name](made[processes], flags.trials, rng)
        is_good = _PROMISES[name](counts)
      else:
        inputs = flags.inputs or 300 * flags.trials
        counts, problems = fuzz.fuzz(name, inputs, flags.seed, folder / name)
        is_good = not counts['wrong']
      is_kept = is_kept and is_good
      line = {
        'test': name,
        'kept': bool(is_good),
        'seed': flags.seed,
        'seconds': round(time.monotonic() - started),
        **{k: int(v) for k, v in sorted(counts.items())},
      }
      print(json.dumps(line), flush=True)
      for problem in problems[:20]:
        print(f'  {problem}', file=sys.stderr, flush=True)
  return 0 if is_kept else 1


if __name__ == '__main__':
  sys.exit(main())
