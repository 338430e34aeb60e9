"""Takes a sweep's jobs from its folder until none is left.

Run the same command on any number of machines that share the folder, and again
after a kill: finished work stays, and jobs that nobody holds are taken.
"""

from collections.abc import Callable
import functools
from pathlib import Path
import shutil
import time
from typing import Any

from absl import logging
import jax

from gemma_jax.config.sweep import SweepConfig
from gemma_jax.formats import open_base
from gemma_jax.runs import prepare as run_lib
from gemma_jax.runs import resume, train
from gemma_jax.runs import workdir as workdir_lib
from gemma_jax.runs.evaluate import Stopped
from gemma_jax.sweep import evaluation, finalize, leases, manifest, results, trials
from gemma_jax.sweep.grid import make_trials

POLL_SECS = 2.0


def run(
  config: SweepConfig, workdir: str, should_stop: Callable[[], bool] = lambda: False
) -> results.Sweep:
  """Works until every trial has ended, here or elsewhere.

  Args:
    config: resolved.
    workdir: shared by the machines that take part.
    should_stop: called at every step and while other machines work.

  Raises:
    ValueError: the folder belongs to another sweep, the base, tokenizer or data
      differ from those of its other trials, or nothing can run; or a job could
      not be done now, and the same command tries it again.
    OSError: likewise, because a file or folder is missing, or the disk is full.
    Stopped: should_stop returned True, and the last finished step is saved.
  """
  if jax.process_count() > 1:
    raise ValueError(
      f'processes: got {jax.process_count()}, expected 1: a sweep is shared by '
      'machines of one host each, through its folder.'
    )
  if '://' in workdir:
    raise ValueError(
      f'workdir: got {workdir}, expected a folder on a mounted file system, which '
      'the leases of a sweep need.'
    )
  workdir_lib.check_writable(workdir)
  with workdir_lib.naming_disk_errors(workdir, lambda: _finished_trials(workdir)):
    return _run(config, workdir, should_stop)


def _finished_trials(workdir: str) -> str:
  return f'{len(list(Path(workdir).glob("cells/*/result.json")))} finished trials'


def _run(config: SweepConfig, workdir: str, should_stop: Callable[[], bool]) -> results.Sweep:
  inputs = _plan(config, workdir, should_stop)
  planned = workdir_lib.read_json(workdir, manifest.NAME)
  assert planned is not None  # `_plan` returns once it is there
  worker = _Worker(config, workdir, planned['fingerprints'], should_stop)
  jobs = planned['jobs']
  if inputs is None:
    any_trial = worker.trials[jobs[0]['cells'][0]].resolve()
    inputs = run_lib.prepare(any_trial).fingerprints()
  worker.check_inputs(inputs)
  for stage in (jobs, [{'name': 'closing', 'kind': 'finalize', 'cells': []}]):
    worker.work(stage)
  return results.read(workdir)


def _plan(config, workdir, should_stop) -> dict[str, str] | None:
  """Writes the manifest, or waits for the machine that does.

  Returns:
    Fingerprints of base, tokenizer and data, if they were read for this.
  """
  draft = None
  while not manifest.check_same_sweep(workdir, config):
    # Bad configs and records are reported before anything is written.
    draft = draft or manifest.draft(config)
    lease = leases.take(f'{workdir}/leases', 'plan')
    if lease is None:
      _wait(should_stop)
      continue
    try:
      if not manifest.check_same_sweep(workdir, config):
        manifest.make(config, workdir, draft)
    finally:
      lease.release()
  return None if draft is None else draft.run.fingerprints()


class _Worker:
  """This process's part in a sweep."""

  def __init__(self, config, workdir, fingerprints, should_stop):
    source = open_base.open_base(config.base.model.path, config.base.model.tokenizer)
    self.config = config
    self.workdir = workdir
    self.should_stop = should_stop
    self.leases = f'{workdir}/leases'
    self.trials = {trial.name: trial.config for trial in make_trials(config, source.config)}
    # Every job calls it on the run that it has prepared: files may change
    # while a sweep is under way.
    self.check_inputs = functools.partial(resume.check_fingerprints, workdir, fingerprints)

  def work(self, jobs: list[dict[str, Any]]) -> None:
    """Does the jobs that are free until all of them have ended."""
    while waiting := [job for job in jobs if not self._has_ended(job)]:
      if self.should_stop():
        raise Stopped
      for job in waiting:
        lease = leases.take(self.leases, job['name'])
        if lease is not None:
          break
      else:
        _wait(self.should_stop)
        continue
      try:
        if not self._has_ended(job):  # the previous holder may have finished it
          self._do(job, lease)
      finally:
        lease.release()

  def _has_ended(self, job) -> bool:
    if job['kind'] == 'finalize':
      return workdir_lib.read_json(self.workdir, 'closed.json') is not None
    return manifest.has_ended(self.workdir, job['cells'])

  def _do(self, job: dict[str, Any], lease: leases.Lease) -> None:
    folders = [manifest.trial_folder(self.workdir, n) for n in job['cells']]

    def should_stop():
      # After losing the lease, write nothing: another machine has the job.
      return self.should_stop() or not lease.is_held()

    logging.info('Job %s: %s', job['name'], ' '.join(job['cells']))
    if job['kind'] != 'finalize':
      manifest.reopen(self.workdir)
    try:
      configs = [self.trials[name].resolve() for name in job['cells']]
      if job['kind'] == 'finalize':
        self._finalize(should_stop)
      elif job['kind'] == 'base':
        evaluation.evaluate_base(configs[0], folders[0], should_stop, self.check_inputs)
      elif job['kind'] == 'full':
        train.train(configs[0], folders[0], should_stop, self.check_inputs)
        shutil.rmtree(f'{folders[0]}/checkpoints', ignore_errors=True)
      else:
        trials.train_batched(
          configs, folders, f'{self.workdir}/jobs/{job["name"]}', should_stop, self.check_inputs
        )
    # A diverged trial would diverge again. Any other exception ends this attempt;
    # the next machine to take the job tries again.
    except FloatingPointError as e:
      if job['kind'] == 'finalize':
        raise
      logging.warning('Job %s failed: %s', job['name'], e)
      for folder in folders:
        if workdir_lib.read_json(folder, 'result.json') is None:
          workdir_lib.write_json(folder, 'failed.json', {'error': str(e)})
    except Stopped:
      if self.should_stop():
        raise
      logging.warning('Another machine has taken over %s', job['name'])

  def _finalize(self, should_stop) -> None:
    configs = {}
    for trial in results.read(self.workdir).finished('lora'):
      configs[trial.name] = self.trials[trial.name].resolve()
    finalize.finalize(configs, self.config.grid, self.workdir, should_stop, self.check_inputs)
    shutil.rmtree(f'{self.workdir}/jobs', ignore_errors=True)
    workdir_lib.write_json(self.workdir, 'closed.json', {})


def _wait(should_stop: Callable[[], bool]) -> None:
  if should_stop():
    raise Stopped
  time.sleep(POLL_SECS)
