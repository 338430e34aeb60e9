"""The training loop, in the order in which it happens.

How a run starts: config, base and data are read first; then, with the workdir
locked, the order is the contract:
  1. this run has finished in the workdir → say so and change nothing, unless
     there are more steps now;
  2. the workdir has a checkpoint → resume it, if base, data and config are its
     own (`resume`);
  3. else load the base, then make the adapter (its shapes follow the base's);
  4. nothing trains from random weights unless model.path says random:.

`loop` has the order within a step.
"""

from collections.abc import Callable, Sequence
import math
import os
import time
from typing import Any

from absl import logging
import tqdm

from gemma_jax.config import train as config_lib
from gemma_jax.config.train import TrainConfig
from gemma_jax.formats import adapter
from gemma_jax.runs import describe, guards, hosts, resume
from gemma_jax.runs import evaluate as evaluate_lib
from gemma_jax.runs import loop as loop_lib
from gemma_jax.runs import metrics as metrics_lib
from gemma_jax.runs import prepare as prepare_lib
from gemma_jax.runs import workdir as workdir_lib
from gemma_jax.runs.checkpoint import Checkpoints
from gemma_jax.runs.evaluate import Evaluation, Stopped
from gemma_jax.runs.trainer import Metrics, Trainer


def train(
  config: TrainConfig,
  workdir: str,
  should_stop: Callable[[], bool] = lambda: False,
  check_inputs: Callable[[dict[str, str]], None] = lambda fingerprints: None,
  log_to: Callable[[str], None] = lambda folder: None,
) -> dict[str, Any]:
  """Trains, or resumes, or reports a finished run.

  Args:
    config: resolved.
    workdir: `gemma_jax.runs.workdir` says what is left there.
    should_stop: asked at every step and every evaluation batch.
    check_inputs: raises if the run's inputs (`Run.fingerprints`) are not wanted.
    log_to: gets the workdir, on the leading process, once this run may write there.

  Returns:
    `steps`, `tokens` (seen in training, padding not counted), `seconds` (of
    this process), `loss_base` and `loss_adapted` (held-out, nats per supervised
    token, before the first update and after the last; at first an adapter changes
    nothing, unless the run started from one, `lora.path`), `loss_best`,
    `adapter` (its folder), `peak_memory_bytes`.

  Raises:
    ValueError: the workdir belongs to another config, base or data, another
      process trains in it, or the processes do not agree.
    FloatingPointError: a loss or gradient is not finite.
    OSError: the workdir's disk is full, read-only or gone, or the workdir was
      renamed.
    Stopped: should_stop said so, and the last finished step is saved.
  """
  hosts.check_agreement('config', config_lib.to_dict(config))
  hosts.check_shared(workdir)
  started = time.perf_counter()
  if not workdir_lib.has_result(workdir):
    workdir_lib.check_writable(workdir)
  run = prepare_lib.prepare(config)
  run.check()  # before there is a workdir, which could fail in its own ways
  facts = resume.facts(run)
  hosts.check_agreement('inputs', facts['fingerprints'])
  check_inputs(facts['fingerprints'])
  should_stop = hosts.any_of_them(should_stop)
  with workdir_lib.naming_disk_errors(workdir), workdir_lib.only_run(workdir) as place:
    finished = resume.finished(workdir, facts)
    if finished is not None:
      logging.info('This run has finished at step %d.', finished['steps'])
      return finished
    return _loop(run, facts, place, should_stop, started, log_to).go()


def _loop(
  run: prepare_lib.Run,
  facts: dict[str, Any],
  place: workdir_lib.Place,
  should_stop: Callable[[], bool],
  started: float,
  log_to: Callable[[str], None],
) -> loop_lib.Loop:
  """The loop, at the step that the workdir has reached."""
  # All refusals come before anything is written.
  checkpoints = Checkpoints(place.workdir, place=place)
  newest = resume.newest(place.workdir, checkpoints, facts)
  hosts.wait_for_all('workdir is checked')
  if hosts.is_lead():
    # The result has fewer steps: from here on only the checkpoint says what is done.
    workdir_lib.remove_result(place.root)
    workdir_lib.write_json(place.root, 'run.json', facts)
    log_to(place.root)
    log_start(run)
  state, notes = None, {'tokens': 0, 'evals': {}}
  if newest is not None:
    step, notes = newest[0], newest[1]['found']
    state = checkpoints.restore(step, run.program.abstract[0])
    logging.info('Resumed from step %d of %s', step, place.workdir)
  trainer = Trainer.of_run(run, state=state)
  _stop_if_asked(trainer, should_stop)
  trainer.compile(run.abstract_batch())
  _stop_if_asked(trainer, should_stop)
  outputs = RunOutputs(run, trainer, facts, place, notes, started)
  profile = loop_lib.Profile(run.config.profile_steps, outputs.metrics.folder, place)
  return loop_lib.Loop(run, trainer, place, checkpoints, facts, outputs, should_stop, profile)


def _stop_if_asked(trainer: Trainer, should_stop: Callable[[], bool]) -> None:
  """Stops before the first step, with nothing to save."""
  if should_stop():
    assert trainer.total_steps is not None  # a run has a last step
    loop_lib.log_stop(trainer.finished, trainer.total_steps)
    raise Stopped


class RunOutputs:
  """What a run of one adapter reports and leaves in its workdir."""

  def __init__(
    self,
    run: prepare_lib.Run,
    trainer: Trainer,
    facts: dict[str, Any],
    place: workdir_lib.Place,
    notes: dict[str, Any],
    started: float,
  ):
    """Opens the metrics.

    Args:
      run: gives config and records.
      trainer: has the adapter.
      facts: from `resume.facts`.
      place: the workdir.
      notes: from the checkpoint that the run continues; they grow.
      started: when the process began to work, from time.perf_counter().
    """
    self.run = run
    self.trainer = trainer
    self.facts = facts
    self.place = place
    self.notes = notes
    self.started = started
    self.first_step = trainer.finished
    self.loop_started = time.perf_counter()
    self.first_evaluation_secs: float | None = None  # before the first update
    self.guard = guards.Guard(
      run.config.max_skipped_batches, notes.setdefault('skipped', []), run.record_ids
    )
    self.metrics = metrics_lib.open_writer(place.root, self.first_step)

  def updated(self, metrics: Metrics) -> str:
    """Guards, metrics line and log; returns what the progress bar shows."""
    tokens = int(metrics.tokens)
    rate = tokens / metrics.seconds
    self.notes['tokens'] += tokens
    line = {
      'loss_nats_per_token': metrics.loss,
      'learning_rate': metrics.learning_rate,
      'grad_norm': metrics.grad_norm,
      'supervised_tokens': int(metrics.weight),
      'tokens': tokens,
      'step_secs': metrics.seconds,
      'data_wait_secs': metrics.wait_seconds,
      'tokens_per_sec': rate,
    }
    if metrics.step == self.first_step + 1:
      line['first_step_secs'] = time.perf_counter() - self.started
      logging.info('Time to first step %.1f s', line['first_step_secs'])
    self.metrics.write(metrics.step, self.guard.check(metrics.step, line))
    # The first update is slower: it warms caches.
    if metrics.step == min(self.first_step + 2, self.run.steps):
      self._log_cost(metrics.seconds)
    if metrics.step % self.run.config.log_every_steps == 0:
      logging.info(
        'Step %d/%d: loss %.4f nats/token, grad norm %.3f, lr %.2e, %.0f tokens/s, %s left',
        metrics.step,
        self.run.steps,
        metrics.loss,
        metrics.grad_norm,
        metrics.learning_rate,
        rate,
        self._time_left(metrics.step),
      )
    return f'loss {metrics.loss:.3f} nats/token, {rate:.0f} tokens/s'

  def wants_evaluation(self, step: int) -> bool:
    """At both ends and every so often in between, once per step."""
    is_end = step in (0, self.run.steps)
    return str(step) not in self.notes['evals'] and (
      is_end or loop_lib.is_due(self.run.config.eval_every_steps, step)
    )

  def evaluated(self, step: int, measured: Sequence[Evaluation], seconds: float) -> None:
    """Reports held-out losses; keeps the adapter if it is the best so far."""
    (evaluation,) = measured
    loss = evaluation.nll_per_token
    guards.check_finite(step, {'eval_loss_nats_per_token': loss})
    is_best = loss < min(self.notes['evals'].values(), default=math.inf)
    self.notes['evals'][str(step)] = loss
    if is_best:
      self._write_adapter('adapter_best', step)
    if hosts.is_lead():
      workdir_lib.write_heldout(
        self.place.root, step, self.run.data.heldout.record_ids, evaluation.nll, evaluation.tokens
      )
    tokens = int(evaluation.tokens.sum())
    self.metrics.write(
      step,
      {'eval_loss_nats_per_token': loss, 'eval_tokens': tokens, 'eval_secs': seconds},
    )
    logging.info(
      'Step %d: held-out loss %.4f nats/token over %d tokens of %d records (%.1f s)',
      step,
      loss,
      tokens,
      len(evaluation.nll),
      seconds,
    )
    if self.trainer.finished == self.first_step:
      self.first_evaluation_secs = seconds
      self.loop_started = time.perf_counter()

  def goes_on(self) -> bool:
    """False once `early_stopping_evals` evaluations in a row gave no lower loss.

    An evaluation at the end of a run that later got more steps does not count: a
    run with these steps from the start would not have made it.
    """
    patience = self.run.config.early_stopping_evals
    losses = [
      loss
      for step, loss in self.notes['evals'].items()
      if step == '0' or loop_lib.is_due(self.run.config.eval_every_steps, int(step))
    ]
    if not patience or len(losses) <= patience:
      return True
    if min(losses[-patience:]) < min(losses[:-patience]):
      return True
    logging.info('No better held-out loss: stopping early.')
    return False

  def saving(self) -> None:
    """Brings the metrics file up to the checkpoint."""
    self.metrics.flush()

  def finish(self, step: int) -> dict[str, Any]:
    """Writes adapter and result."""
    folder = self._write_adapter('adapter', step)
    losses = self.notes['evals']
    result = {
      'steps': step,
      'tokens': self.notes['tokens'],
      'seconds': round(time.perf_counter() - self.started, 2),
      'loss_base': losses['0'],
      'loss_adapted': losses[str(step)],
      'loss_best': min(losses.values()),
      'adapter': 'adapter',  # the workdir may be moved
      'peak_memory_bytes': metrics_lib.peak_memory_bytes(),
    }
    self.place.check()
    if hosts.is_lead():
      workdir_lib.write_json(self.place.root, 'result.json', {**result, 'run': self.facts})
    return {**result, 'adapter': folder}

  def close(self) -> None:
    """Flushes the metrics."""
    self.metrics.close()

  def _log_cost(self, update_secs: float) -> None:
    """Says what the evaluations will take; a run that goes on has said so before."""
    if self.first_evaluation_secs is None or not hosts.is_lead():
      return
    line, remedy = evaluate_lib.cost(
      self.first_evaluation_secs,
      update_secs,
      self.run.steps,
      self.run.config.eval_every_steps,
      len(self.run.data.heldout),
    )
    if remedy:
      logging.warning('%s: %s.', line, remedy)
    else:
      logging.info('%s.', line)

  def _time_left(self, step: int) -> str:
    """'1:02:03' at the pace since the loop began, evaluations included."""
    pace = (time.perf_counter() - self.loop_started) / (step - self.first_step)
    return tqdm.tqdm.format_interval(pace * (self.run.steps - step))

  def _write_adapter(self, name: str, step: int) -> str:
    """Writes the current adapter, measured at this step, to a folder of the workdir."""
    self.place.check()
    lora = self.trainer.host_lora()
    if hosts.is_lead():
      adapter.write(f'{self.place.root}/{name}', lora, self._results(name, step))
    return f'{self.place.workdir}/{name}'

  def _results(self, name: str, step: int) -> list[str]:
    """What the adapter's model card says of the run."""
    data, losses = self.run.data, self.notes['evals']
    # A loss that chose the adapter flatters it.
    chosen = f' (the lowest of {len(losses)})' if name == 'adapter_best' else ''
    return [
      f'{len(data.train):,} training records of `{os.path.basename(data.config.path)}`; '
      f'{step:,} updates, {self.notes["tokens"]:,} tokens',
      f'loss on {len(data.heldout):,} held-out records, nats per token: {losses["0"]:.4f} before '
      f'this run, {losses[str(step)]:.4f} after{chosen}',
    ]


def log_start(run: prepare_lib.Run) -> None:
  """Logs the parameter table and description, before anything expensive."""
  table = run.summary().table(leaves=False)
  for line in f'{table}\n{describe.describe(run)}'.splitlines():
    logging.info('%s', line)
