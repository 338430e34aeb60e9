"""A run in its workdir: what happens around the updates, and in which order.

    update; evaluate if due; checkpoint if due; stop if asked to, after saving

So a checkpoint at step n holds what evaluation n measured, or the resumed run
evaluates first: it repeats nothing and misses nothing. One adapter and several
share this loop, each with an `Outputs` of its own.

Several processes go through it together, each with its part of every batch.
What they decide by, losses and whether to stop, is the same on all of them; the
leading one logs, and writes everything but checkpoints.
"""

from collections.abc import Callable, Sequence
import contextlib
import os
import time
from typing import Any, Protocol

from absl import logging
import jax

from gemma_jax.runs import hosts
from gemma_jax.runs import workdir as workdir_lib
from gemma_jax.runs.checkpoint import Checkpoints
from gemma_jax.runs.evaluate import Evaluation, Stopped
from gemma_jax.runs.prepare import Run
from gemma_jax.runs.trainer import Metrics, Trainer


class Outputs(Protocol):
  """What a run reports and writes.

  Attributes:
    notes: what a checkpoint keeps beside the state; JSON-able.
  """

  notes: dict[str, Any]

  def goes_on(self) -> bool:
    """Whether another update is wanted."""
    ...

  def updated(self, metrics: Metrics) -> str:
    """After an update; returns what the progress bar shows."""
    ...

  def wants_evaluation(self, step: int) -> bool:
    """Whether this step is to be evaluated, and was not yet."""
    ...

  def evaluated(self, step: int, measured: Sequence[Evaluation], seconds: float) -> None:
    """After an evaluation, with the losses of each adapter."""

  def saving(self) -> None:
    """Before a checkpoint."""

  def finish(self, step: int) -> Any:
    """After the last checkpoint is committed; returns the result."""

  def close(self) -> None:
    """At the end, whatever failed."""


class Loop:
  """A run with weights in memory."""

  def __init__(
    self,
    run: Run,
    trainer: Trainer,
    place: workdir_lib.Place,
    checkpoints: Checkpoints,
    facts: dict[str, Any],
    outputs: Outputs,
    should_stop: Callable[[], bool],
    profile: 'Profile',
  ):
    """Starts nothing yet.

    Args:
      run: gives the schedule of evaluations and checkpoints.
      trainer: at the start, or where a checkpoint left it.
      place: the workdir.
      checkpoints: the run's; closed at the end.
      facts: from `resume.facts`, saved with every checkpoint.
      outputs: the run's; closed at the end.
      should_stop: asked at every update and every evaluation batch.
      profile: closed at the end.
    """
    self.run = run
    self.trainer = trainer
    self.place = place
    self.checkpoints = checkpoints
    self.facts = facts
    self.outputs = outputs
    self.should_stop = should_stop
    self.saved = trainer.finished  # the step of the newest checkpoint
    self.profile = profile

  def go(self) -> Any:
    """Trains to the end.

    Raises:
      Stopped: should_stop said so, and the last finished update is saved.
    """
    config, steps = self.run.config, self.run.steps
    with contextlib.ExitStack() as at_end:  # each is closed, whatever fails
      for part in (self.checkpoints, self.outputs, self.profile):
        at_end.callback(part.close)
      try:
        self._evaluate_if_wanted()  # even one that a stop cut short
        with hosts.progress_bar(total=steps, initial=self.trainer.finished, unit='step') as bar:
          for wait_seconds, batch in self.trainer.batches(steps):
            if not self.outputs.goes_on():
              break
            self.profile.before(self.trainer.finished)
            metrics = self.trainer.step(batch, wait_seconds)
            bar.set_postfix_str(self.outputs.updated(metrics))
            bar.update()
            self._evaluate_if_wanted()
            if is_due(config.checkpoint_every_steps, metrics.step):
              self._save()
            if self.should_stop():
              raise Stopped
        self._evaluate_if_wanted()
        self._save()
        self.checkpoints.wait()
        return self.outputs.finish(self.trainer.finished)
      except Stopped:
        self._save()
        self.checkpoints.wait()
        log_stop(self.trainer.finished, steps)
        raise

  def _evaluate_if_wanted(self) -> None:
    step, started = self.trainer.finished, time.perf_counter()
    if not self.outputs.wants_evaluation(step):
      return
    measured = self.trainer.evaluate(should_stop=self.should_stop)
    self.place.check()
    several = self.run.members is not None
    self.outputs.evaluated(step, measured if several else [measured], time.perf_counter() - started)

  def _save(self) -> None:
    """Starts a checkpoint of the last finished update, if there is none."""
    step = self.trainer.finished
    if step == self.saved:
      return
    self.place.check()
    self.outputs.saving()
    self.checkpoints.save(self.trainer.state, {**self.facts, 'found': self.outputs.notes})
    self.saved = step


class Profile:
  """A jax.profiler trace of some updates, written by the leading process."""

  def __init__(
    self,
    steps: Sequence[int] = (),
    folder: str | os.PathLike = '',
    place: workdir_lib.Place | None = None,
  ):
    """Traces nothing yet.

    Args:
      steps: traced from the smallest to the largest.
      folder: where the folder `profile` is made.
      place: the workdir, checked before anything is written.
    """
    self._steps = steps
    self._folder = folder
    self._place = place
    self._is_tracing = False

  def before(self, step: int) -> None:
    """Starts or ends the trace, before update `step` (from 0)."""
    if self._steps and step == min(self._steps) and hosts.is_lead():
      jax.profiler.start_trace(os.path.join(self._folder, 'profile'))
      self._is_tracing = True
    if self._steps and step == max(self._steps) + 1:
      self.close()

  def close(self) -> None:
    """Writes the trace, if one is being taken."""
    if self._is_tracing:
      if self._place is not None:
        self._place.check()
      jax.profiler.stop_trace()
      self._is_tracing = False


def is_due(every: int, step: int) -> bool:
  """Whether something done every `every` updates is due at this one."""
  return every > 0 and step % every == 0


def log_stop(step: int, steps: int) -> None:
  """Logs where a run was stopped."""
  logging.warning('Stopped at step %d of %d.', step, steps)
