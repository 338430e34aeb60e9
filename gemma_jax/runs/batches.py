"""Batches of any structure: checks before a step, and means of what was measured."""

from collections.abc import Iterable, Iterator
import time
from typing import Any, Protocol, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax import pytree

# The dtypes that leaves of these names must have; others are of any number, or booleans.
_KINDS = {
  **dict.fromkeys(('tokens', 'targets', 'segment_ids', 'positions'), jnp.integer),
  'weights': jnp.floating,
}


class Positioned(Protocol):
  """Batches whose position can be saved and restored."""

  def __iter__(self) -> Iterator[Any]: ...

  def state(self) -> Any:
    """The position, JSON-able."""

  def restore(self, state: Any) -> None:
    """Goes to a position that `state` returned."""


def has_position(data: Any) -> TypeGuard[Positioned]:
  """Whether training on an iterable can resume."""
  return hasattr(data, 'state') and hasattr(data, 'restore')


def checked(batch: Any, parts: int, num_tokens: int, max_positions: int) -> Any:
  """The batch as NumPy arrays in dtypes that devices take.

  Args:
    batch: a pytree of arrays.
    parts: must divide the number of rows.
    num_tokens: the base's; `tokens`, and `targets` that have a weight, are below it.
    max_positions: the base's; rows of `tokens` are not longer.

  Raises:
    ValueError: leaves that are not arrays with one number of rows, rows that do
      not divide, or a dtype, token or length that a leaf of this name cannot have.
  """
  named = pytree.items(batch)
  if not named:
    raise ValueError('batch: got no array, expected a pytree whose leading axis is rows.')
  rows = {}
  for name, x in named:
    place = name or 'the root'
    if not hasattr(x, 'dtype') or not np.ndim(x):
      kind = 'a scalar' if np.ndim(x) == 0 else type(x).__name__
      raise ValueError(
        f'batch: got {kind} at {place}, expected an array whose leading axis is rows; '
        'a Dataset makes batches of records.'
      )
    rows[place] = x.shape[0]
    wanted = _KINDS.get(name.split('/')[-1], jnp.number)
    is_mask = wanted is jnp.number and x.dtype == bool
    if not is_mask and not jnp.issubdtype(x.dtype, wanted):
      raise ValueError(f'batch: got {x.dtype} at {place}, expected {wanted.__name__} values.')
  if len(set(rows.values())) > 1:
    raise ValueError(f'batch: got different numbers of rows, {rows}, expected one.')
  count = next(iter(rows.values()))
  if not count or count % parts:
    raise ValueError(
      f'batch: got {count} rows, expected a multiple of {parts}: accumulate_steps times the '
      'parts into which the mesh splits rows.'
    )
  arrays = {name: np.asarray(x) for name, x in named}
  for name, x in arrays.items():
    folder, _, leaf = name.rpartition('/')
    if leaf == 'tokens' and x.shape[-1] > max_positions:
      raise ValueError(
        f'batch: got rows of {x.shape[-1]} {name}, expected at most {max_positions}, the positions '
        'of the base.'
      )
    weights = arrays.get(f'{folder}/weights'.lstrip('/')) if leaf == 'targets' else None
    if weights is not None and weights.shape == x.shape:
      x = x[weights != 0]
    if leaf in ('tokens', 'targets') and x.size and not 0 <= x.min() <= x.max() < num_tokens:
      raise ValueError(
        f'batch: got {name} from {x.min()} to {x.max()}, expected 0 to {num_tokens - 1}, the '
        'tokens of the base; a target that does not count has weight 0.'
      )
  return jax.tree.map(lambda x: np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype)), batch)


def means(returned: Iterable[Any]) -> dict[str, np.ndarray]:
  """'loss', 'weight' and a loss's metrics, averaged over batches.

  Args:
    returned: what a `training.step.LossFn` returned for each batch.

  Raises:
    ValueError: there is no batch.
  """
  sums: dict[str, np.ndarray] = {}
  for total, weight, metrics in returned:
    for name, pair in {'loss': (total, weight), **metrics}.items():
      sums[name] = sums.get(name, 0.0) + np.asarray(pair, np.float64)
  if not sums:
    raise ValueError('data: got no batch to evaluate, expected at least one.')
  result = {name: total / np.where(w == 0, 1, w) for name, (total, w) in sums.items()}
  return {**result, 'weight': sums['loss'][1]}


def timed(items: Iterable[Any]) -> Iterator[tuple[float, Any]]:
  """(seconds spent waiting for it, item) for each item."""
  items = iter(items)
  while True:
    started = time.perf_counter()
    try:
      item = next(items)
    except StopIteration:
      return
    yield time.perf_counter() - started, item
