"""A workdir for a `Trainer` in a notebook, which continues where it stopped.

`launch.train` has more in its workdir and decides by its config
(`runs.resume`); here the objects that a `Trainer` was given decide.
"""

from collections.abc import Mapping
import contextlib
import hashlib
import os
from typing import Any
import weakref

from absl import logging
import jax
import numpy as np

from gemma_jax import files, pytree
from gemma_jax.runs import workdir as workdir_lib
from gemma_jax.runs.checkpoint import Checkpoints
from gemma_jax.training.state import TrainState

# This process's, by workdir: a cell that is run again makes its trainer while the
# former one still exists, perhaps kept by the traceback of a Ctrl-C.
_OPEN: 'weakref.WeakValueDictionary[str, Saves]' = weakref.WeakValueDictionary()


class Saves:
  """Checkpoints of one trainer, which has the workdir to itself.

  A later trainer in this process that may continue there takes it over.

  Attributes:
    newest: (step, notes) to continue from, or None.
  """

  def __init__(self, workdir: str, every_steps: int, facts: Mapping[str, Any]):
    """Takes the workdir.

    Args:
      workdir: a folder, made if need be.
      every_steps: updates between checkpoints.
      facts: what must be the same when training continues; JSON-able.

    Raises:
      ValueError: another process trains there, or other facts hold there.
    """
    if isinstance(every_steps, bool) or not isinstance(every_steps, int) or every_steps < 1:
      raise ValueError(f'save_every_steps: got {every_steps!r}, expected an integer >= 1.')
    self._every_steps = every_steps
    self._facts = dict(facts)
    self._workdir = workdir
    name = workdir if files.is_remote(workdir) else os.path.realpath(workdir)
    former = _OPEN.get(name)
    if former is not None:
      self._check(workdir, former._facts)
      former.close()
    stack = contextlib.ExitStack()
    # Runs when the trainer is collected: a notebook never says that it is done.
    self.close = weakref.finalize(self, stack.close)
    self._place = stack.enter_context(workdir_lib.only_run(workdir))
    self._checkpoints = Checkpoints(workdir, place=self._place)
    stack.callback(self._checkpoints.close)
    step = self._checkpoints.latest_step()
    self._saved = step or 0
    self.newest: tuple[int, dict[str, Any]] | None = None
    if step is not None:
      notes = self._checkpoints.read_notes(step)
      try:
        self._check(workdir, notes.get('trainer'))
      except ValueError:
        self.close()  # now, as the traceback may keep this object
        raise
      self.newest = step, notes
    _OPEN[name] = self

  def restore(self, abstract: TrainState) -> TrainState:
    """The state of `newest`, with the shardings of an abstract one."""
    assert self.newest is not None  # else there is nothing to restore
    step, _ = self.newest
    logging.info('Continues from step %d of %s', step, self._place.workdir)
    return self._checkpoints.restore(step, abstract)

  def check_open(self) -> None:
    """ValueError if a later trainer has taken the workdir over."""
    if not self.close.alive:
      raise ValueError(
        f'workdir {self._workdir}: a later trainer has taken it over, expected one at a time. '
        'Use the later one.'
      )

  def save_if_due(self, state: TrainState, position: Any) -> None:
    """Starts a checkpoint if one is due."""
    if int(state.step) % self._every_steps == 0:
      self.save(state, position)

  def save(self, state: TrainState, position: Any) -> None:
    """Starts a checkpoint, unless this step has one.

    Args:
      state: may be donated right after.
      position: the data's; JSON-able.
    """
    step = int(state.step)
    if step == self._saved:
      return
    self._place.check()
    self._checkpoints.save(state, {'trainer': self._facts, 'data': position})
    self._saved = step

  def wait(self) -> None:
    """Returns once the last checkpoint is committed."""
    self._checkpoints.wait()

  def _check(self, workdir: str, before: Any) -> None:
    if not isinstance(before, dict):
      raise ValueError(
        f'workdir {workdir}: has a checkpoint of launch.train, expected one of a Trainer. '
        'Use another workdir.'
      )
    for name in sorted(before.keys() | self._facts.keys()):
      if before.get(name) != self._facts.get(name):
        raise ValueError(
          f'workdir {workdir}: was made with {name}={before.get(name)!r}, this trainer has '
          f'{self._facts.get(name)!r}. Use another workdir, or the same {name}.'
        )


def digest(tree: Any) -> str:
  """SHA-256, in hex, of the names and bytes of a tree of arrays."""
  total = hashlib.sha256()
  for name, x in pytree.items(jax.device_get(tree)):
    total.update(name.encode())
    total.update(np.ascontiguousarray(x).tobytes())
  return total.hexdigest()
