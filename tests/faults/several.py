"""One of two processes is killed, or does not answer for a minute."""

import collections
import contextlib
import os
import re
import signal
import time

import numpy as np

from gemma_jax.runs import metrics
from tests.faults import runs as runs_lib

_STOPPED_SECS = 60
_KINDS = ('a worker killed', 'the coordinator killed', 'one stopped')


def several(runs: runs_lib.Runs, trials: int, rng: np.random.Generator):
  """Disturbs a run of two processes at a random update.

  The launcher starts both again, and the run must end as an undisturbed one of
  two processes does.

  Args:
    runs: of two processes.
    trials: disturbances, of each kind in turn.
    rng: of the updates at which they happen.

  Returns:
    What was counted, by name.
  """
  found = collections.Counter()
  for trial in range(trials):
    kind = _KINDS[trial % len(_KINDS)]
    workdir = runs.folder / f'several{trial}'
    process = runs.start(workdir)
    try:
      _wait_for(workdir, int(rng.integers(1, 50)), process)
      pids = _pids(workdir)
      victim = pids[0] if kind == _KINDS[1] else pids[1]
      _disturb(kind, victim)
      code = process.wait(runs_lib.TIMEOUT_SECS)
    finally:
      process.terminate()
    log = runs_lib.log_path(workdir).read_text()
    found[kind] += 1
    found['disturbed'] += 1
    found['started again'] += 'restarting all of them' in log
    found['ended'] += code == 0
    found['bit-equal adapters'] += runs.is_equal(workdir)
  return found


def _disturb(kind: str, pid: int) -> None:
  if kind != _KINDS[2]:
    os.kill(pid, signal.SIGKILL)
    return
  os.kill(pid, signal.SIGSTOP)
  time.sleep(_STOPPED_SECS)
  with contextlib.suppress(ProcessLookupError):  # the launcher has ended it
    os.kill(pid, signal.SIGCONT)


def _wait_for(workdir, updates: int, process) -> None:
  """Returns when so many updates are done."""
  while process.poll() is None:
    rows = metrics.read(workdir / 'metrics.jsonl')
    if rows and rows[-1]['step'] >= updates:
      return
    time.sleep(0.02)


def _pids(workdir) -> list[int]:
  log = runs_lib.log_path(workdir).read_text()
  return [int(pid) for pid in re.search(r'processes ([\d ]+)', log)[1].split()]
