"""A run that is killed, or asked to stop, at a random moment."""

import collections
import signal
import subprocess

from absl import logging
import numpy as np

from gemma_jax.runs import metrics
from launch.app import EXIT_RESUMABLE
from tests.faults import runs as runs_lib


def kill(runs: runs_lib.Runs, trials: int, rng: np.random.Generator):
  """SIGKILL, then the same command, until it ends."""
  return _disturb(runs, trials, rng, signal.SIGKILL)


def stop(runs: runs_lib.Runs, trials: int, rng: np.random.Generator):
  """SIGTERM, then the same command, until it ends.

  A stopped run exits with 75 and names the step that it saved. A signal that
  comes before the command has begun (Python starts) or when all is written
  (Python ends) ends it as any program.
  """
  return _disturb(runs, trials, rng, signal.SIGTERM)


def _disturb(
  runs: runs_lib.Runs, trials: int, rng: np.random.Generator, number: signal.Signals
) -> collections.Counter:
  """Sends signals at moments uniform over the time of an undisturbed run.

  Args:
    runs: to disturb.
    trials: signals in all.
    rng: of the moments.
    number: the signal.

  Returns:
    What was counted, by name.
  """
  found = collections.Counter()
  while found['signals'] < trials:
    workdir = runs.folder / f'{number.name}{found["runs"]}'
    found['runs'] += 1
    committed = 0
    while found['signals'] < trials:
      code = _start_and_signal(runs, workdir, rng, number)
      if code == 0:
        break
      found['signals'] += 1
      found[f'exits with {code}'] += 1
      found[f'while {runs_lib.phase(workdir)}'] += 1
      step = runs_lib.newest_step(workdir)
      log = runs_lib.log_path(workdir).read_text()
      if code not in (-number, EXIT_RESUMABLE):
        logging.error('Exit code %d; its log:\n%s', code, log)
      found['named the step saved'] += f'Stopped at step {step} of' in log
      found['steps lost'] += max(0, committed - step)
      committed = step
    _finish(runs, workdir, committed, found)
  return found


def _start_and_signal(runs, workdir, rng, number) -> int:
  """The exit code after a signal at a random moment, or without one."""
  process = runs.start(workdir)
  try:
    try:
      return process.wait(rng.uniform(0, runs.seconds))
    except subprocess.TimeoutExpired:
      process.send_signal(number)
    return process.wait(runs_lib.TIMEOUT_SECS)
  finally:
    process.kill()


def _finish(runs, workdir, committed, found) -> None:
  """Runs to the end, undisturbed, and compares."""
  code, log = 0, ''
  if not (workdir / 'result.json').exists():
    code, log = runs.finish(workdir)
  is_resumed = f'Resumed from step {committed} of' in log
  found['resumed elsewhere'] += bool(log and committed and not is_resumed)
  found['ended'] += code == 0
  found['bit-equal adapters'] += runs.is_equal(workdir)
  rows = metrics.read(workdir / 'metrics.jsonl')
  steps = [r['step'] for r in rows if 'loss_nats_per_token' in r]
  found['whole metrics'] += steps == list(range(1, len(steps) + 1))
