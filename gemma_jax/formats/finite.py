"""Rejects weights that are NaN or infinite, as they are read or cast.

One of them makes every logit NaN, and a loss or text made from those looks like a
bad model, not like a bad file.
"""

import functools
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
  from gemma_jax.formats.base_source import StoredTensor

# Exponent bits, all set in infinities and NaN, of dtypes that NumPy tests slowly.
_EXPONENTS = {np.dtype(np.float16): 0x7C00, np.dtype(ml_dtypes.bfloat16): 0x7F80}


def checked(tensor: 'StoredTensor', where: str) -> 'StoredTensor':
  """The tensor with a `read` that raises ValueError for values that are not finite.

  Args:
    tensor: from a file.
    where: the file or folder, for messages.
  """
  read = functools.partial(_read, tensor, where)
  return type(tensor)(tensor.name, tensor.shape, read)


def check(values: np.ndarray, name: str, where: str, first_row: int = 0):
  """Raises a ValueError with the file's name if there is a `problem`."""
  if (reason := problem(values, name, first_row)) is not None:
    raise ValueError(f'{where}: {reason}')


def narrow(
  values: np.ndarray, dtype: np.dtype, name: str, where: str, first_row: int = 0
) -> np.ndarray:
  """Values in a narrower dtype; unchanged if it is not narrower.

  Args:
    values: [rows, ...]; those that are not finite stay so.
    dtype: bfloat16 ends a little below float32, and rounds values in between to
      infinity.
    name: of the tensor.
    where: the base or the output, for messages.
    first_row: number of values[0] in the tensor.

  Raises:
    ValueError: the dtype cannot hold a value; names it.
  """
  if dtype.itemsize >= values.itemsize:
    return values
  with np.errstate(over='ignore'):
    narrowed = values.astype(dtype)
  if _is_finite(narrowed):
    return narrowed
  is_lost = np.isfinite(values.astype(np.float32)) & ~np.isfinite(narrowed.astype(np.float32))
  if is_lost.any():
    index, place = _first(is_lost, first_row)
    raise ValueError(
      f'{where}: tensor {name} is {values[index]:.4g} at {place}, expected at most '
      f'{float(ml_dtypes.finfo(dtype).max):.4g}, the largest {dtype.name}. Set '
      'model.dtype=float32.'
    )
  return narrowed


def problem(values: np.ndarray, name: str, first_row: int = 0) -> str | None:
  """Describes values that are not all finite; None if they are.

  Args:
    values: [rows, ...], floating point.
    name: of the tensor.
    first_row: number of values[0] in the tensor.
  """
  if _is_finite(values):
    return None
  index, place = _first(~np.isfinite(values.astype(np.float32)), first_row)
  return (
    f'tensor {name} is {float(values[index])} at {place}, expected finite numbers; the file is '
    'damaged, or the training diverged. Use another checkpoint.'
  )


def _read(tensor: 'StoredTensor', where: str, start: int, stop: int) -> np.ndarray:
  values = tensor.read(start, stop)
  check(values, tensor.name, where, start)
  return values


def _first(is_bad: np.ndarray, first_row: int) -> tuple[tuple[int, ...], list[int]]:
  """Where the first bad value is, in `is_bad` and in the tensor."""
  index = tuple(map(int, np.argwhere(is_bad)[0]))
  return index, [index[0] + first_row, *index[1:]]


def _is_finite(values: np.ndarray) -> bool:
  if values.dtype in _EXPONENTS:
    exponent = np.uint16(_EXPONENTS[values.dtype])
    bits = np.ascontiguousarray(values).view(np.uint16)
    return not np.any((bits & exponent) == exponent)
  return bool(np.isfinite(values).all())
