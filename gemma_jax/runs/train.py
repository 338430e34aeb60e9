"""The training loop, in the order in which it happens.

How a run starts. Base, data and config are read first; then, with the workdir
locked, the order is the contract:
  1. a finished run in the workdir, and it is this one → say so and change
     nothing, unless there are more steps now;
  2. a checkpoint in the workdir → resume it, if base, data and config are its
     own (`resume`);
  3. else load the base, then make the adapter (its shapes follow the base's);
  4. there is no training from random weights unless model.path says random:.

How a step goes: compute; check that its loss and gradient are finite, or skip
its update, if the config allows so many; evaluate if due, and keep the best
adapter; checkpoint if due; stop if asked to, after saving. So a checkpoint at
step n holds what evaluation n found, or the resumed run evaluates first: it
repeats nothing and misses nothing.

Several processes go through this together, each with its part of every batch.
What they decide by, losses and whether to stop, is the same on all of them; the
leading one logs and writes what is not a checkpoint.
"""

from collections.abc import Callable
import contextlib
import time
from typing import Any

from absl import logging
import jax
import numpy as np
import tqdm

from gemma_jax import pytree
from gemma_jax.config import train as config_lib
from gemma_jax.config.train import TrainConfig
from gemma_jax.data import pipeline
from gemma_jax.formats import peft
from gemma_jax.formats.trained_with import TrainedWith
from gemma_jax.runs import describe, guards, hosts, resume
from gemma_jax.runs import evaluate as evaluate_lib
from gemma_jax.runs import metrics as metrics_lib
from gemma_jax.runs import prepare as run_lib
from gemma_jax.runs import workdir as workdir_lib
from gemma_jax.runs.checkpoint import Checkpoints
from gemma_jax.runs.evaluate import Stopped
from gemma_jax.training import compiler, sharding
from gemma_jax.training import state as state_lib


def train(
  config: TrainConfig,
  workdir: str,
  should_stop: Callable[[], bool] = lambda: False,
  check_inputs: Callable[[dict[str, str]], None] = lambda fingerprints: None,
) -> dict[str, Any]:
  """Trains, or resumes, or reports a finished run.

  Args:
    config: resolved.
    workdir: see `gemma_jax.runs.workdir` for what is left there.
    should_stop: asked at every step and every evaluation batch.
    check_inputs: raises if the run is not to be on these (`Run.fingerprints`).

  Returns:
    `steps`, `tokens` (seen in training, padding not counted), `seconds` (of
    this process), `loss_base` and `loss_adapted` (held-out, nats per supervised
    token, before the first update and after the last; before it an adapter
    changes nothing, unless the run started from one, `lora.path`), `loss_best`,
    `adapter` (its folder), `peak_memory_bytes`.

  Raises:
    ValueError: the workdir belongs to another config, base or data, or another
      process trains in it, or the processes do not agree on these.
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
  run = run_lib.prepare(config)
  run.check()  # before there is a workdir that could have trouble of its own
  facts = resume.facts(run)
  hosts.check_agreement('inputs', facts['fingerprints'])
  check_inputs(facts['fingerprints'])
  should_stop = hosts.any_of_them(should_stop)
  try:
    with workdir_lib.only_run(workdir) as place:
      finished = resume.finished(workdir, facts)
      if finished is not None:
        logging.info('This run has finished at step %d.', finished['steps'])
        return finished
      return Trainer(run, facts, place, should_stop, started).train()
  except workdir_lib.Moved:
    raise
  except Exception as e:
    trouble = workdir_lib.disk_error(workdir, e)
    if trouble is None:
      raise
    raise trouble from e


class Trainer:
  """A run with weights in memory: what the loop needs besides its order."""

  def __init__(
    self,
    run: run_lib.Run,
    facts: dict[str, Any],
    place: workdir_lib.Place,
    should_stop: Callable[[], bool],
    started: float,
  ):
    self.run = run
    self.facts = facts
    self.place = place
    self.workdir = place.workdir
    self.should_stop = should_stop
    self.started = started  # of time.perf_counter()
    self.is_tracing = False
    self.loop_start = (0, started)  # first step of this process, and when

    # Whatever can be refused is refused before anything is written.
    self.checkpoints = Checkpoints(self.workdir, place=place)
    newest = resume.newest(self.workdir, self.checkpoints, facts)
    hosts.wait_for_all('workdir is checked')
    if hosts.is_lead():
      # Of fewer steps: from here on the checkpoint alone says what is done.
      workdir_lib.remove_result(place.root)
      workdir_lib.write_json(place.root, 'run.json', facts)
      log_start(run)

    self.state, self.frozen, self.found = self._start(newest)
    self.stop_if_asked()
    self.guard = guards.Guard(
      run.config.max_skipped_batches, self.found.setdefault('skipped', []), run.record_ids
    )
    self.train_step, self.eval_step = (
      compiler.ByLength(compile_step, run.config.data.seq_len)
      for compile_step in (run.compile_train_step, run.compile_eval_step)
    )
    self.stop_if_asked()
    self.metrics = metrics_lib.open_writer(place.root, self.step)

  @property
  def step(self) -> int:
    """Finished updates."""
    return int(self.state.step)

  def train(self) -> dict[str, Any]:
    """The loop; see the module's docstring for its order."""
    with contextlib.ExitStack() as at_end:  # each is closed, whatever fails
      at_end.callback(self.checkpoints.close)
      at_end.callback(self.metrics.close)
      at_end.callback(self.stop_profile)
      return self._loop()

  def _loop(self) -> dict[str, Any]:
    config, run = self.run.config, self.run
    try:
      step = self.step
      self.evaluate_if_due(step)  # also one that a stop cut short
      self.loop_start = (step, time.perf_counter())
      batches = pipeline.train_batches(
        run.train,
        run.plan,
        step,
        run.steps,
        sharding.local_rows(run.mesh, config.data.global_batch_size),
        self.put,
      )
      with hosts.progress_bar(total=run.steps, initial=step, unit='step') as bar:
        for wait_secs, step, batch in metrics_lib.timed(batches):
          if self.stops_early():
            logging.info('No better held-out loss: stopping early.')
            break
          self.profile(step)
          self.update(step, batch, wait_secs, bar)
          step += 1
          self.evaluate_if_due(step)
          if _due(config.checkpoint_every_steps, step):
            self.save()
          if self.should_stop():
            raise Stopped
      return self.finish()
    except Stopped:
      if self.step > 0:
        self.save()
        self.checkpoints.wait()
      logging.warning('Stopped at step %d of %d.', self.step, run.steps)
      raise

  def stop_if_asked(self) -> None:
    """Stops before the first step, with nothing to save."""
    if self.should_stop():
      logging.warning('Stopped at step %d of %d.', self.step, self.run.steps)
      raise Stopped

  def update(self, step: int, batch: Any, wait_secs: float, bar: tqdm.tqdm) -> None:
    """One update, its metrics line and its place on the progress bar."""
    started = time.perf_counter()
    self.state, values = self.train_step(self.state, self.frozen, batch)
    values = {name: float(x) for name, x in values.items()}  # waits for it
    seconds = wait_secs + time.perf_counter() - started
    tokens = int(values['tokens'])
    self.found['tokens'] += tokens
    line = {
      'loss_nats_per_token': values['loss'],
      'learning_rate': values['learning_rate'],
      'grad_norm': values['grad_norm'],
      'supervised_tokens': int(values['supervised_tokens']),
      'tokens': tokens,
      'step_secs': seconds,
      'data_wait_secs': wait_secs,
      'tokens_per_sec': tokens / seconds,
    }
    if step == self.loop_start[0]:
      line['first_step_secs'] = time.perf_counter() - self.started
      logging.info('Time to first step %.1f s', line['first_step_secs'])
    self.metrics.write(step + 1, self.guard.check(step + 1, line))
    bar.set_postfix_str(f'loss {values["loss"]:.3f} nats/token, {tokens / seconds:.0f} tokens/s')
    bar.update()
    if (step + 1) % self.run.config.log_every_steps == 0:
      logging.info(
        'Step %d/%d: loss %.4f nats/token, grad norm %.3f, lr %.2e, %.0f tokens/s, %s left',
        step + 1,
        self.run.steps,
        values['loss'],
        values['grad_norm'],
        values['learning_rate'],
        tokens / seconds,
        self.time_left(step + 1),
      )

  def time_left(self, step: int) -> str:
    """'1:02:03' at the pace since the loop began, evaluations included."""
    first, started = self.loop_start
    pace_secs = (time.perf_counter() - started) / (step - first)
    return tqdm.tqdm.format_interval(pace_secs * (self.run.steps - step))

  def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch on the mesh: all of its rows, or those of this process."""
    rows = self.run.config.data.global_batch_size
    return sharding.put_batch(batch, self.run.mesh, rows)

  def evaluate_if_due(self, step: int) -> None:
    """Evaluates at the ends and in between, once at each step."""
    is_end = step in (0, self.run.steps)
    is_due = is_end or _due(self.run.config.eval_every_steps, step)
    if is_due and str(step) not in self.found['evals']:
      self.evaluate(step)

  def evaluate(self, step: int) -> evaluate_lib.Evaluation:
    """Held-out loss now; the adapter is kept if it is the best so far."""
    run, started = self.run, time.perf_counter()
    data = run.config.data
    found = evaluate_lib.evaluate(
      lambda batch: self.eval_step(self.state.trainable, self.frozen, self.put(batch)),
      pipeline.eval_batches(run.heldout, data.seq_len, data.global_batch_size, data.packing),
      len(run.heldout),
      self.should_stop,
    )
    loss, seconds = found.nll_per_token, time.perf_counter() - started
    guards.check_finite(step, {'eval_loss_nats_per_token': loss})
    self.place.check()
    if not self.found['evals'] or loss < min(self.found['evals'].values()):
      self.write_adapter('adapter_best')
    if hosts.is_lead():
      workdir_lib.write_heldout(
        self.place.root, step, run.heldout.record_ids, found.nll, found.tokens
      )
    self.found['evals'][str(step)] = loss
    self.metrics.write(
      step,
      {
        'eval_loss_nats_per_token': loss,
        'eval_tokens': int(found.tokens.sum()),
        'eval_secs': seconds,
      },
    )
    logging.info(
      'Step %d: held-out loss %.4f nats/token over %d tokens of %d records (%.1f s)',
      step,
      loss,
      found.tokens.sum(),
      len(found.nll),
      seconds,
    )
    return found

  def stops_early(self) -> bool:
    """Whether the last `early_stopping_evals` evaluations found no lower loss.

    One at the end of a run that then got more steps does not count: a run that
    had them from the start would not have made it.
    """
    patience = self.run.config.early_stopping_evals
    losses = [
      loss
      for step, loss in self.found['evals'].items()
      if step == '0' or _due(self.run.config.eval_every_steps, int(step))
    ]
    if not patience or len(losses) <= patience:
      return False
    return min(losses[-patience:]) >= min(losses[:-patience])

  def save(self) -> None:
    """Starts a checkpoint of the last finished update."""
    self.place.check()
    self.metrics.flush()
    self.checkpoints.save(self.state, {**self.facts, 'found': self.found})

  def write_adapter(self, name: str) -> str:
    """Writes the adapter as it is now to a folder of the workdir."""
    self.place.check()
    variables = state_lib.join(self.state.trainable, self.frozen)
    trained_base = pytree.prune(self.state.trainable.get('params', {}))
    factors, trained_base = hosts.to_numpy((variables['lora'], trained_base))
    if hosts.is_lead():
      peft.write_adapter(
        f'{self.place.root}/{name}',
        factors,
        self.run.config.lora,
        self.run.source.reference,
        trained_base,
        TrainedWith.of(self.run.config.data),
      )
    return f'{self.workdir}/{name}'

  def finish(self) -> dict[str, Any]:
    """Last evaluation, checkpoint, adapter and result."""
    step = self.step
    if str(step) not in self.found['evals']:
      self.evaluate(step)
    if step > 0 and self.checkpoints.latest_step() != step:
      self.save()
    folder = self.write_adapter('adapter')
    self.checkpoints.wait()
    losses = self.found['evals']
    result = {
      'steps': step,
      'tokens': self.found['tokens'],
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

  def profile(self, step: int) -> None:
    """Starts and ends a jax.profiler trace around `profile_steps`."""
    steps = self.run.config.profile_steps
    if steps and step == min(steps) and hosts.is_lead():
      jax.profiler.start_trace(f'{self.metrics.folder}/profile')
      self.is_tracing = True
    if steps and step == max(steps) + 1:
      self.stop_profile()

  def stop_profile(self) -> None:
    """Writes the trace, if one is being taken."""
    if self.is_tracing:
      self.place.check()
      jax.profiler.stop_trace()
      self.is_tracing = False

  def _start(self, newest: tuple[int, dict[str, Any]] | None):
    """(state, frozen, what evaluations found) of step 0 or of a checkpoint."""
    run = self.run
    trainable, frozen = run.load()
    abstract_state, _ = run.abstract
    if newest is not None:
      step, notes = newest
      state = self.checkpoints.restore(step, abstract_state)
      logging.info('Resumed from step %d of %s', step, self.workdir)
      return state, frozen, notes['found']
    init = jax.jit(
      lambda t: state_lib.init_state(t, run.tx),
      out_shardings=jax.tree.map(lambda x: x.sharding, abstract_state),
      donate_argnums=0,
    )
    return init(trainable), frozen, {'tokens': 0, 'evals': {}}


def log_start(run: run_lib.Run) -> None:
  """Parameter table and description, before anything expensive."""
  table = run.summary().table(leaves=False)
  for line in f'{table}\n{describe.describe(run)}'.splitlines():
    logging.info('%s', line)


def _due(every: int, step: int) -> bool:
  return every > 0 and step % every == 0
