"""Trains the trials of one batch, and resumes them from their checkpoint.

All adapters are in one checkpoint. One whose loss is no longer finite fails and
is ignored from then on; the others are unaffected.
"""

from collections.abc import Callable, Sequence
import os
from pathlib import Path
import shutil
from typing import Any

from absl import logging
import numpy as np

from gemma_jax.config.train import TrainConfig
from gemma_jax.formats import adapter
from gemma_jax.lora import spectrum
from gemma_jax.runs import guards, resume
from gemma_jax.runs import loop as loop_lib
from gemma_jax.runs import metrics as metrics_lib
from gemma_jax.runs import prepare as prepare_lib
from gemma_jax.runs import workdir as workdir_lib
from gemma_jax.runs.checkpoint import Checkpoints
from gemma_jax.runs.evaluate import Evaluation
from gemma_jax.runs.trainer import Metrics, Trainer


def train_batched(
  configs: Sequence[TrainConfig],
  folders: Sequence[str],
  workdir: str,
  should_stop: Callable[[], bool] = lambda: False,
  check_inputs: Callable[[dict[str, str]], None] = lambda fingerprints: None,
) -> None:
  """Trains trials at once and writes a result or a failure into each folder.

  Args:
    configs: of the trials, resolved.
    folders: of the trials: `heldout/`, `spectrum/`, `metrics.jsonl`, `adapter/`
      and, at the end, `result.json` or `failed.json`.
    workdir: of the batch; its checkpoints are removed at the end.
    should_stop: called at every step and every evaluation batch.
    check_inputs: as in `train.train`.

  Raises:
    Stopped: should_stop returned True, and the last finished step is saved.
    OSError: the workdir was renamed, or its disk is full; says which step is safe.
  """
  run = prepare_lib.prepare_several(configs)
  facts = resume.facts(run)
  check_inputs(facts['fingerprints'])
  with workdir_lib.naming_disk_errors(workdir), workdir_lib.only_run(workdir) as place:
    checkpoints = Checkpoints(workdir, place=place)
    newest = resume.newest(workdir, checkpoints, facts)
    for folder in folders:
      os.makedirs(folder, exist_ok=True)
    workdir_lib.write_json(place.root, 'run.json', facts)
    state, notes = None, {'tokens': 0, 'seconds': 0.0, 'evals': {}, 'failed': {}}
    if newest is not None:
      step, notes = newest[0], newest[1]['found']
      state = checkpoints.restore(step, run.program.abstract[0])
      logging.info('Resumed %d trials from step %d of %s', len(configs), step, workdir)
    trainer = Trainer.of_run(run, state=state)
    trainer.compile(run.abstract_batch())
    place.check()
    outputs = TrialOutputs(run, trainer, folders, place, notes)
    loop_lib.Loop(
      run, trainer, place, checkpoints, facts, outputs, should_stop, loop_lib.Profile()
    ).go()
    # Every trial has its result: nothing will resume from this checkpoint.
    shutil.rmtree(Path(workdir) / 'checkpoints')


class TrialOutputs:
  """What trials that train at once report, and write into one folder each."""

  def __init__(
    self,
    run: prepare_lib.Run,
    trainer: Trainer,
    folders: Sequence[str],
    place: workdir_lib.Place,
    notes: dict[str, Any],
  ):
    """Opens the metrics files.

    Args:
      run: gives configs and records.
      trainer: has the adapters.
      folders: of the trials.
      place: of the batch's workdir.
      notes: from the checkpoint that the batch resumes from; updated in place.
    """
    self.run = run
    self.trainer = trainer
    self.folders = [str(folder) for folder in folders]
    self.place = place
    self.notes = notes
    self.metrics = [metrics_lib.MetricsWriter(folder, trainer.finished) for folder in self.folders]

  @property
  def alive(self) -> list[int]:
    """Trials that have not failed."""
    return [i for i in range(len(self.folders)) if str(i) not in self.notes['failed']]

  def goes_on(self) -> bool:
    """Whether any trial is alive."""
    return bool(self.alive)

  def updated(self, metrics: Metrics) -> str:
    """Writes metrics lines and the log; a trial that is no longer finite fails."""
    tokens = int(metrics.tokens[0])
    self.notes['tokens'] += tokens
    self.notes['seconds'] += metrics.seconds
    for i in self.alive:
      own = metrics.of_member(i)
      line = {
        'loss_nats_per_token': own.loss,
        'learning_rate': own.learning_rate,
        'grad_norm': own.grad_norm,
        'supervised_tokens': int(own.weight),
        'tokens': tokens,
        'gang_step_secs': metrics.seconds,
      }
      if self._is_finite(i, metrics.step, line):
        self.metrics[i].write(metrics.step, line)
    losses = metrics.loss[self.alive]
    low, high = losses.min(initial=np.inf), losses.max(initial=0)
    if metrics.step % self.run.config.log_every_steps == 0:
      logging.info(
        'Step %d/%d of %d adapters: losses %.4f to %.4f nats/token, %.0f tokens/s for each, %.2f s',
        metrics.step,
        self.run.steps,
        len(self.folders),
        low,
        high,
        tokens / metrics.seconds,
        metrics.seconds,
      )
    return f'losses {low:.3f} to {high:.3f} nats/token'

  def wants_evaluation(self, step: int) -> bool:
    """Whether one is due: at intervals and at the end; the base has a trial of its own."""
    is_due = step > 0 and loop_lib.is_due(self.run.config.eval_every_steps, step)
    return (step == self.run.steps or is_due) and str(step) not in self.notes['evals']

  def evaluated(self, step: int, measured: Sequence[Evaluation], seconds: float) -> None:
    """Writes held-out losses and spectra of the trials that are alive."""
    losses = {}
    for i in self.alive:
      own = measured[i]
      line = {
        'eval_loss_nats_per_token': own.nll_per_token,
        'eval_tokens': int(own.tokens.sum()),
        'gang_eval_secs': seconds,
      }
      if not self._is_finite(i, step, line):
        continue
      losses[str(i)] = own.nll_per_token
      self.metrics[i].write(step, line)
      workdir_lib.write_heldout(
        self.folders[i], step, self.run.data.heldout.record_ids, own.nll, own.tokens
      )
    for i, lora in enumerate(self.trainer.host_lora().members()):
      if str(i) in losses:
        values = spectrum.singular_values(lora, self.run.base.config)
        folder = Path(self.folders[i]) / 'spectrum'
        folder.mkdir(exist_ok=True)
        content = {name: x.tolist() for name, x in values.items()}
        workdir_lib.write_json(str(folder), f'step_{step}.json', content)
    self.notes['evals'][str(step)] = losses
    logging.info(
      'Step %d: held-out losses %s nats/token (%.1f s)',
      step,
      ' '.join(f'{x:.4f}' for x in losses.values()),
      seconds,
    )

  def saving(self) -> None:
    """Does nothing: lines are written at once."""

  def finish(self, step: int) -> None:
    """Writes every trial's adapter and, last, its result."""
    self.place.check()
    loras = self.trainer.host_lora().members()
    for i, folder in enumerate(self.folders):
      error = self.notes['failed'].get(str(i))
      if error is not None:
        workdir_lib.write_json(folder, 'failed.json', {'error': error})
        continue
      adapter.write(f'{folder}/adapter', loras[i])
      result = {
        'steps': step,
        'tokens': self.notes['tokens'],
        'gang_size': len(self.folders),
        # A trial's share of the training time alone.
        'seconds': round(self.notes['seconds'] / len(self.folders), 3),
        'loss_adapted': self.notes['evals'][str(step)][str(i)],
        'peak_memory_bytes': metrics_lib.peak_memory_bytes(),
      }
      workdir_lib.write_json(folder, 'result.json', result)

  def close(self) -> None:
    """Flushes the metrics."""
    for writer in self.metrics:
      writer.close()

  def _is_finite(self, i: int, step: int, line: dict[str, Any]) -> bool:
    try:
      guards.check_finite(step, line)
      return True
    except FloatingPointError as e:
      self.notes['failed'][str(i)] = str(e)
      logging.warning('%s failed: %s', self.folders[i], e)
      return False
