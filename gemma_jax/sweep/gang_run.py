"""Trains the cells of one gang, and resumes them from their checkpoint.

The order of a step is that of `train`: compute, evaluate if due, checkpoint if
due, stop if asked to. All members stand in one checkpoint. A member whose loss
is no longer finite fails and is ignored from there on; it touches no other.
"""

from collections.abc import Callable, Sequence
import os
from pathlib import Path
import shutil
import time
from typing import Any

from absl import logging
import jax
import numpy as np
import tqdm

from gemma_jax.config.train import TrainConfig
from gemma_jax.data import pipeline
from gemma_jax.formats import peft
from gemma_jax.formats.trained_with import TrainedWith
from gemma_jax.lora import spectrum
from gemma_jax.runs import batched, guards, resume
from gemma_jax.runs import metrics as metrics_lib
from gemma_jax.runs import workdir as workdir_lib
from gemma_jax.runs.checkpoint import Checkpoints
from gemma_jax.runs.evaluate import Stopped
from gemma_jax.sweep import evaluation
from gemma_jax.training import compiler, sharding
from gemma_jax.training import state as state_lib


def train_gang(
  configs: Sequence[TrainConfig],
  folders: Sequence[str],
  workdir: str,
  should_stop: Callable[[], bool] = lambda: False,
  check_inputs: Callable[[dict[str, str]], None] = lambda fingerprints: None,
) -> None:
  """Trains cells together and leaves a result or a failure in each folder.

  Args:
    configs: of the cells, resolved.
    folders: of the cells: `heldout/`, `spectrum/`, `metrics.jsonl`, `adapter/`
      and, at last, `result.json` or `failed.json`.
    workdir: of the gang; its checkpoints are removed at the end.
    should_stop: asked at every step and every evaluation batch.
    check_inputs: as `train.train` takes it.

  Raises:
    Stopped: should_stop said so, and the last finished step is saved.
    OSError: the workdir was renamed.
  """
  gang = batched.Gang(configs)
  facts = resume.facts(gang.run)
  check_inputs(facts['fingerprints'])
  with workdir_lib.only_run(workdir) as place:
    _Trainer(gang, facts, folders, place, should_stop).train()


class _Trainer:
  """A gang with weights in memory."""

  def __init__(self, gang, facts, folders, place, should_stop):
    self.gang = gang
    self.run = gang.run
    self.facts = facts
    self.folders = [str(folder) for folder in folders]
    self.place = place
    self.workdir = place.workdir
    self.should_stop = should_stop
    self.checkpoints = Checkpoints(self.workdir, place=place)
    newest = resume.newest(self.workdir, self.checkpoints, facts)
    for folder in self.folders:
      os.makedirs(folder, exist_ok=True)
    workdir_lib.write_json(place.root, 'run.json', facts)
    self.members = gang.members
    self.state, self.frozen, self.found = self._start(newest)
    self.train_step, self.eval_step = (
      compiler.ByLength(compile_step, self.run.config.data.seq_len)
      for compile_step in (gang.compile_train_step, gang.compile_eval_step)
    )
    place.check()
    self.metrics = [metrics_lib.MetricsWriter(folder, self.step) for folder in self.folders]

  @property
  def step(self) -> int:
    return int(self.state.step)

  @property
  def alive(self) -> list[int]:
    """Members that have not failed."""
    failed = self.found['failed']
    return [i for i in range(len(self.gang)) if str(i) not in failed]

  def train(self) -> None:
    config, run = self.run.config, self.run
    try:
      batches = pipeline.train_batches(run.train, run.plan, self.step, run.steps)
      with tqdm.tqdm(total=run.steps, initial=self.step, unit='step', disable=None) as bar:
        self._evaluate_if_due(self.step)  # one that a stop cut short
        for step, batch in batches:
          self._update(step, batch)
          bar.update()
          self._evaluate_if_due(step + 1)
          every = config.checkpoint_every_steps
          if every and (step + 1) % every == 0:
            self._save()
          if self.should_stop():
            raise Stopped
          if not self.alive:
            break
      self._finish()
    except Stopped:
      if self.step > 0:
        self._save()
      logging.warning('Stopped at step %d of %d.', self.step, run.steps)
      raise
    finally:
      for writer in self.metrics:
        writer.close()
      self.checkpoints.close()
    # Every cell has its result: nothing will resume from here.
    shutil.rmtree(Path(self.workdir) / 'checkpoints')

  def _update(self, step: int, batch: Any) -> None:
    started = time.perf_counter()
    tokens = int((batch['segment_ids'] > 0).sum())
    self.state, values = self.train_step(
      self.state, self.members, self.frozen, sharding.put_batch(batch, self.run.mesh)
    )
    values = jax.device_get(values)
    seconds = time.perf_counter() - started
    self.found['tokens'] += tokens
    self.found['seconds'] += seconds
    for i in self.alive:
      line = {
        'loss_nats_per_token': float(values['loss'][i]),
        'learning_rate': float(values['learning_rate'][i]),
        'grad_norm': float(values['grad_norm'][i]),
        'supervised_tokens': int(values['supervised_tokens'][i]),
        'tokens': tokens,
        'gang_step_secs': seconds,
      }
      if self._is_finite(i, step + 1, line):
        self.metrics[i].write(step + 1, line)
    if (step + 1) % self.run.config.log_every_steps == 0:
      losses = values['loss'][self.alive]
      logging.info(
        'Step %d/%d of a gang of %d: losses %.4f to %.4f nats/token, '
        '%.0f tokens/s for each, %.2f s',
        step + 1,
        self.run.steps,
        len(self.gang),
        losses.min(initial=np.inf),
        losses.max(initial=0),
        tokens / seconds,
        seconds,
      )

  def _is_finite(self, i: int, step: int, line: dict[str, Any]) -> bool:
    try:
      guards.check_finite(step, line)
      return True
    except FloatingPointError as e:
      self.found['failed'][str(i)] = str(e)
      logging.warning('%s failed: %s', self.folders[i], e)
      return False

  def _evaluate_if_due(self, step: int) -> None:
    every = self.run.config.eval_every_steps
    due = step == self.run.steps or (step and every and step % every == 0)
    if not due or str(step) in self.found['evals']:
      return
    started = time.perf_counter()
    found = evaluation.evaluate_members(
      lambda batch: self.eval_step(self.state.trainable, self.members, self.frozen, batch),
      self.run,
      len(self.gang),
      self.should_stop,
    )
    seconds = time.perf_counter() - started
    self.place.check()
    losses = {}
    for i in self.alive:
      loss = found[i].nll_per_token
      line = {
        'eval_loss_nats_per_token': loss,
        'eval_tokens': int(found[i].tokens.sum()),
        'gang_eval_secs': seconds,
      }
      if not self._is_finite(i, step, line):
        continue
      losses[str(i)] = loss
      self.metrics[i].write(step, line)
      workdir_lib.write_heldout(
        self.folders[i], step, self.run.heldout.record_ids, found[i].nll, found[i].tokens
      )
      self._write_spectrum(i, step)
    self.found['evals'][str(step)] = losses
    logging.info(
      'Step %d: held-out losses %s nats/token (%.1f s)',
      step,
      ' '.join(f'{x:.4f}' for x in losses.values()),
      seconds,
    )

  def _factors(self, i: int) -> Any:
    config = self.gang.configs[i]
    mine = jax.device_get(batched.member(self.state.trainable['lora'], i))
    return batched.cut(mine, config.lora.rank)

  def _write_spectrum(self, i: int, step: int) -> None:
    values = spectrum.singular_values(
      self._factors(i), self.gang.configs[i].lora, self.run.source.config
    )
    folder = Path(self.folders[i]) / 'spectrum'
    folder.mkdir(exist_ok=True)
    workdir_lib.write_json(
      str(folder), f'step_{step}.json', {name: x.tolist() for name, x in values.items()}
    )

  def _save(self) -> None:
    if self.checkpoints.latest_step() == self.step:
      return
    self.place.check()
    self.checkpoints.save(self.state, {**self.facts, 'found': self.found})

  def _finish(self) -> None:
    """Writes every cell's adapter and, last, its result."""
    self.checkpoints.wait()
    self.place.check()
    for i, folder in enumerate(self.folders):
      error = self.found['failed'].get(str(i))
      if error is not None:
        workdir_lib.write_json(folder, 'failed.json', {'error': error})
        continue
      peft.write_adapter(
        f'{folder}/adapter',
        self._factors(i),
        self.gang.configs[i].lora,
        self.run.source.reference,
        trained_with=TrainedWith.of(self.gang.configs[i].data),
      )
      result = {
        'steps': self.step,
        'tokens': self.found['tokens'],
        'gang_size': len(self.gang),
        # Of training alone, a member's share.
        'seconds': round(self.found['seconds'] / len(self.gang), 3),
        'loss_adapted': self.found['evals'][str(self.step)][str(i)],
        'peak_memory_bytes': metrics_lib.peak_memory_bytes(),
      }
      workdir_lib.write_json(folder, 'result.json', result)

  def _start(self, newest: tuple[int, dict[str, Any]] | None):
    """(state, frozen, findings) of step 0 or of a checkpoint."""
    abstract_state, _ = self.gang.abstract
    params = evaluation.load_base(self.run)
    trainable, frozen = state_lib.split(
      {'params': params, 'lora': self.gang.init_adapters(params)}, self.run.config.trainable
    )
    if newest is not None:
      step, found = newest[0], newest[1]['found']
      logging.info('Resumed a gang from step %d of %s', step, self.workdir)
      return self.checkpoints.restore(step, abstract_state), frozen, found
    state = jax.device_put(
      batched.init_state(trainable, self.run.tx), jax.tree.map(lambda x: x.sharding, abstract_state)
    )
    found = {'tokens': 0, 'seconds': 0.0, 'evals': {}, 'failed': {}}
    return state, frozen, found
