"""Checkpoints of what a run changes: trainable leaves, moments, step. No base.

Orbax writes each step to a temporary folder and renames it when it is whole, in
the background; a kill in between leaves the previous step. Arrays are stored by
path, so a checkpoint does not depend on optax's classes. Beside them, as JSON,
stands everything else that a resume needs: the full config, the fingerprints of
base, tokenizer and data, and what the evaluations have found so far. The
position in the data is the step.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax import files, pytree
from gemma_jax.train_state import TrainState


class Checkpoints:
  """The checkpoints under `workdir/checkpoints`; the newest two are kept."""

  def __init__(self, workdir: str, read_only: bool = False):
    """Opens the folder; read_only neither makes nor cleans anything."""
    import orbax.checkpoint as ocp

    self._ocp = ocp
    self._manager = ocp.CheckpointManager(
      files.absolute(workdir) / 'checkpoints',
      item_handlers={
        'state': ocp.StandardCheckpointHandler(),
        'notes': ocp.JsonCheckpointHandler(),
      },
      options=ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else 2,
        cleanup_tmp_directories=not read_only,
        create=not read_only,
        read_only=read_only,
      ),
    )

  def latest_step(self) -> int | None:
    """Newest step that is whole, or None."""
    return self._manager.latest_step()

  def save(self, state: TrainState, notes: dict[str, Any]) -> None:
    """Starts to save a step; returns once the arrays are copied.

    Args:
      state: may be donated to the next step right after.
      notes: JSON-able facts of the run at this step.
    """
    # A copy on the device: Orbax reads it in the background.
    arrays = _by_path(jax.tree.map(jnp.copy, state))
    self._manager.save(
      int(state.step),
      args=self._ocp.args.Composite(
        state=self._ocp.args.StandardSave(arrays),
        notes=self._ocp.args.JsonSave(notes),
      ),
    )

  def read_notes(self, step: int) -> dict[str, Any]:
    """The facts saved with a step."""
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
    restored = self._manager.restore(
      step,
      args=self._ocp.args.Composite(
        state=self._ocp.args.StandardRestore(_by_path(abstract))
      ),
    )
    leaves = dict(pytree.items(restored['state']))
    return pytree.map_with_name(lambda name, _: leaves[name], abstract)

  def wait(self) -> None:
    """Blocks until the last save is committed."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save and stops the background threads."""
    self._manager.close()

  def _check_leaves(self, step, abstract):
    saved = dict(pytree.items(self._manager.item_metadata(step)['state'].tree))
    wanted = dict(pytree.items(_by_path(abstract)))
    where = f'{self._manager.directory}/{step}'
    if saved.keys() != wanted.keys():
      missing = sorted(wanted.keys() - saved.keys())
      extra = sorted(saved.keys() - wanted.keys())
      raise ValueError(
        f'checkpoint {where}: lacks {missing[:3]} and has {extra[:3]} beyond '
        'what this run trains. Use another workdir.'
      )
    for name, leaf in wanted.items():
      got = (tuple(saved[name].shape), np.dtype(saved[name].dtype))
      want = (tuple(leaf.shape), np.dtype(leaf.dtype))
      if got != want:
        raise ValueError(
          f'checkpoint {where}: {name} is {got[1]} {got[0]}, expected '
          f'{want[1]} {want[0]}. Use another workdir.'
        )


def _by_path(state: TrainState) -> dict[str, Any]:
  """Nested dicts of the state's leaves, without optax's classes."""
  return pytree.unflatten(dict(pytree.items(state)))
