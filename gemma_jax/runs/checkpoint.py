"""Checkpoints of what a run changes: trainable leaves, moments, step. No base.

Orbax writes each step to a temporary folder and renames it when it is whole, in
the background; a kill in between leaves the previous step. Arrays are stored by
path, so a checkpoint does not depend on optax's classes. Beside them, as JSON,
is everything else that a resume needs: the full config, the fingerprints of
base, tokenizer and data, and the results of the evaluations so far. The position
in the data is the step.

Each step carries checksums (`checksums.seal`), renamed with it. Opening the
folder checks the newest step: a damaged one is renamed to N.set_aside, with a
warning, and the newest good one is used; the updates after it are computed
again.
"""

import contextlib
from typing import Any

from absl import logging
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from gemma_jax import files, pytree
from gemma_jax.runs import checksums
from gemma_jax.runs.workdir import Place
from gemma_jax.training.state import TrainState

# Orbax writes to this file once more while it renames a step.
_TIMES = '_CHECKPOINT_METADATA'
# What Orbax parses in Python; some kilobytes, and some hundred for a large model.
_TEXTS = (_TIMES, 'notes/metadata', 'state/_*', 'state/array_metadatas/*')
_LARGE_TEXT_BYTES = 1 << 20


class Checkpoints:
  """The checkpoints under `workdir/checkpoints`; the newest two are kept.

  Attributes:
    folder: their folder.
  """

  def __init__(self, workdir: str, read_only: bool = False, place: Place | None = None):
    """Opens the folder and checks its newest step.

    Args:
      workdir: the run's.
      read_only: makes, cleans and renames nothing; damaged steps are skipped.
      place: the workdir as `workdir.only_run` gives it; None uses the path
        alone.
    """
    import orbax.checkpoint as ocp

    self._ocp = ocp
    self.folder = self._root = files.absolute(workdir) / 'checkpoints'
    self._place = place
    if place is not None and place.root != workdir:
      # Not resolved, so that a save under way follows the workdir.
      self._root = files.path(place.root) / 'checkpoints'
    self._unusable = self._check_newest(read_only)
    self._saving = None  # the step of the last save
    with self._reading():
      self._manager = ocp.CheckpointManager(
        self._root,
        item_handlers={
          'state': ocp.StandardCheckpointHandler(),
          'notes': ocp.JsonCheckpointHandler(),
        },
        options=ocp.CheckpointManagerOptions(
          max_to_keep=None if read_only else 2,
          cleanup_tmp_directories=not read_only,
          create=not read_only,
          read_only=read_only,
          # Called when all files are written, before the folder is renamed.
          async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        ),
      )

  def latest_step(self) -> int | None:
    """Newest complete step, or None."""
    steps = set(self._manager.all_steps()) - self._unusable
    return max(steps, default=None)

  def save(self, state: TrainState, notes: dict[str, Any]) -> None:
    """Starts to save a step; returns once the arrays are copied.

    Args:
      state: may be donated to the next step right after.
      notes: JSON-able facts about the run at this step.
    """
    self.wait()
    self._saving = int(state.step)
    # A copy on the device: Orbax reads it in the background.
    arrays = _by_path(jax.tree.map(jnp.copy, state))
    self._manager.save(
      self._saving,
      args=self._ocp.args.Composite(
        state=self._ocp.args.StandardSave(arrays), notes=self._ocp.args.JsonSave(notes)
      ),
    )

  def read_notes(self, step: int) -> dict[str, Any]:
    """The facts saved with a step."""
    with self._reading(step):
      restored = self._manager.restore(
        step, args=self._ocp.args.Composite(notes=self._ocp.args.JsonRestore())
      )
      return restored['notes']

  def restore(self, step: int, abstract: TrainState) -> TrainState:
    """Reads a step onto the shardings of an abstract state.

    Args:
      step: from `latest_step`.
      abstract: `jax.ShapeDtypeStruct`s with shardings.

    Raises:
      ValueError: a leaf is missing, or has another shape or dtype (Orbax by
        itself would cast a dtype silently).
    """
    self._check_leaves(step, abstract)
    leaves = dict(pytree.items(self._read_state(step, _by_path(abstract))))
    return pytree.map_with_name(lambda name, _: leaves[name], abstract)

  def read_leaves(self, step: int) -> dict[str, np.ndarray]:
    """All arrays of a step by path, whole, in this host's memory."""
    on_host = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    tree = jax.tree.map(lambda x: x.update(sharding=on_host), self._read_tree(step))
    return dict(pytree.items(jax.device_get(self._read_state(step, tree))))

  def wait(self) -> None:
    """Blocks until the last save is committed."""
    try:
      self._manager.wait_until_finished()
      if self._saving is not None and jax.process_index() == 0:
        self._check_place()
        # What Orbax wrote while it renamed the folder.
        checksums.seal(self._root / str(self._saving))
    finally:
      self._saving = None

  def close(self) -> None:
    """Waits for the last save and stops the background threads."""
    self.wait()
    self._manager.close()

  def _check_newest(self, read_only: bool) -> set[int]:
    """Sets damaged steps aside, or returns them where nothing may change."""
    bad = {}
    if jax.process_index() == 0:
      good, bad = checksums.newest_good(self._root)
      for step, defect in bad.items():
        what = f'Checkpoint {step} of {self.folder} is damaged: {defect}'
        if step == good:
          logging.warning('%s. It is the only one left: used unchecked.', what)
          self._check_texts(step)
          continue
        if not read_only:
          aside = checksums.set_aside(self._root, step)
          what += f'; renamed to {aside.name}'
        logging.warning(
          '%s. Going on from %s.', what, 'the start' if good is None else f'step {good}'
        )
      if good is not None:
        bad.pop(good, None)
    if jax.process_count() > 1:  # the others wait for the renames
      multihost_utils.sync_global_devices('checkpoints are checked')
    return set(bad) if read_only else set()

  def _check_texts(self, step: int) -> None:
    """ValueError for a text of Orbax's that would take memory out of proportion."""
    folder = self._root / str(step)
    for path in (path for pattern in _TEXTS for path in folder.glob(pattern)):
      if path.stat().length > _LARGE_TEXT_BYTES:
        with self._reading(step):
          files.parse_json(path.read_bytes())

  def _check_place(self) -> None:
    """OSError if the folder was renamed where paths do not follow it."""
    if self._place is not None and self._place.root == self._place.workdir:
      self._place.check()

  def _seal(self) -> None:
    """Adds checksums to the step that is about to be renamed."""
    self._check_place()
    name = str(self._saving)
    for folder in (f'{name}.orbax-checkpoint-tmp', name):
      if (self._root / folder).exists():
        checksums.seal(self._root / folder, skip=(_TIMES,))
        return

  def _read_state(self, step, tree):
    with self._reading(step):
      restored = self._manager.restore(
        step, args=self._ocp.args.Composite(state=self._ocp.args.StandardRestore(tree))
      )
      return restored['state']

  def _read_tree(self, step):
    """Shapes and dtypes of the state's leaves, as the folder has them."""
    with self._reading(step):
      tree = self._manager.item_metadata(step)['state'].tree
      return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

  @contextlib.contextmanager
  def _reading(self, step: int | str = ''):
    """ValueError in place of what Orbax raises for a broken folder."""
    try:
      yield
    except Exception as e:
      reason = ' '.join(f'{type(e).__name__}: {e}'.split())
      reason = reason.replace(str(self._root), str(self.folder))
      raise ValueError(
        f'checkpoint {self.folder / str(step)}: cannot be read '
        f'({reason:.300}). Rename the step to use an older one.'
      ) from e

  def _check_leaves(self, step, abstract):
    saved = dict(pytree.items(self._read_tree(step)))
    wanted = dict(pytree.items(_by_path(abstract)))
    where = f'{self.folder}/{step}'
    if saved.keys() != wanted.keys():
      missing = sorted(wanted.keys() - saved.keys())
      extra = sorted(saved.keys() - wanted.keys())
      raise ValueError(
        f'checkpoint {where}: lacks {missing[:3]} and has {extra[:3]}, which '
        'this run does not train. Use another workdir.'
      )
    for name, leaf in wanted.items():
      got, want = ((x.shape, np.dtype(x.dtype)) for x in (saved[name], leaf))
      if got != want:
        raise ValueError(
          f'checkpoint {where}: {name} is {got[1]} {got[0]}, expected '
          f'{want[1]} {want[0]}. Use another workdir.'
        )


def _by_path(state: TrainState) -> dict[str, Any]:
  """Nested dicts of the state's leaves, without optax's classes."""
  return pytree.unflatten(dict(pytree.items(state)))
