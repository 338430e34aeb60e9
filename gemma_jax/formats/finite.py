"""Refuses weights that are NaN or infinite, as they are read.

One of them makes every logit NaN, and a loss or a text made of those looks like
a bad model, not like a bad file.
"""

import functools
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
  from gemma_jax.formats.base_source import StoredTensor

# Exponent bits, all set in infinities and NaN, of what NumPy tests slowly.
_EXPONENTS = {np.dtype(np.float16): 0x7C00, np.dtype(ml_dtypes.bfloat16): 0x7F80}


def checked(tensor: 'StoredTensor', where: str) -> 'StoredTensor':
  """The tensor with a `read` that raises ValueError for what is not finite.

  Args:
    tensor: of a file.
    where: the file or folder, for messages.
  """
  read = functools.partial(_read, tensor, where)
  return type(tensor)(tensor.name, tensor.shape, read)


def check(values: np.ndarray, name: str, where: str, first_row: int = 0):
  """ValueError with the file's name if there is a `problem`."""
  if (reason := problem(values, name, first_row)) is not None:
    raise ValueError(f'{where}: {reason}')


def problem(values: np.ndarray, name: str, first_row: int = 0) -> str | None:
  """What to say of values that are not all finite; None if they are.

  Args:
    values: [rows, ...], floating point.
    name: of the tensor.
    first_row: number of values[0] in the tensor.
  """
  if _is_finite(values):
    return None
  (row, *rest), *_ = np.argwhere(~np.isfinite(values.astype(np.float32)))
  got = float(values[(row, *rest)])
  place = [int(row) + first_row, *map(int, rest)]
  return (
    f'tensor {name} is {got} at {place}, expected finite numbers; the file is '
    'damaged, or its training diverged. Use another checkpoint.'
  )


def _read(tensor: 'StoredTensor', where: str, start: int, stop: int) -> np.ndarray:
  values = tensor.read(start, stop)
  check(values, tensor.name, where, start)
  return values


def _is_finite(values: np.ndarray) -> bool:
  if values.dtype in _EXPONENTS:
    exponent = np.uint16(_EXPONENTS[values.dtype])
    bits = np.ascontiguousarray(values).view(np.uint16)
    return not np.any((bits & exponent) == exponent)
  return bool(np.isfinite(values).all())
