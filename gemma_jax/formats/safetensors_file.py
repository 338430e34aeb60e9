"""The safetensors container: checked, and read and written by rows.

Layout (https://github.com/huggingface/safetensors#format): header size u64,
little-endian; a JSON object {name: {dtype, shape, data_offsets}}; the data.
NumPy has no bfloat16, which the `safetensors` package needs, so rows are handled
here with `ml_dtypes`. The header is trusted only after it has been compared with
the size of the file.
"""

from collections.abc import Mapping
from concurrent import futures
import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma_jax import files
from gemma_jax.formats import base_source, finite

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit

_ITEM_BYTES = {
  'F64': 8,
  'F32': 4,
  'F16': 2,
  'BF16': 2,
  'I64': 8,
  'I32': 4,
  'I16': 2,
  'I8': 1,
  'U64': 8,
  'U32': 4,
  'U16': 2,
  'U8': 1,
  'BOOL': 1,
  'F8_E4M3': 1,
  'F8_E5M2': 1,
}
_WEIGHT_DTYPES = {
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
  """One tensor of a safetensors file.

  Attributes:
    path: the file.
    name: the tensor's name.
    dtype_name: as the format spells it: 'BF16', 'F32', ...
    shape: axis sizes.
    offset: its first byte in the file.
  """

  path: Path
  name: str
  dtype_name: str
  shape: tuple[int, ...]
  offset: int

  @property
  def dtype(self) -> np.dtype:
    """float32, float16 or bfloat16; ValueError names any other."""
    if self.dtype_name not in _WEIGHT_DTYPES:
      raise ValueError(
        f'{self.path}: tensor {self.name} has dtype {self.dtype_name}, '
        f'expected one of {", ".join(_WEIGHT_DTYPES)}; quantized weights are '
        'read from GGUF files.'
      )
    return _WEIGHT_DTYPES[self.dtype_name]

  def read(self, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of the first axis, in the stored dtype."""
    row_elements = math.prod(self.shape[1:])
    values = np.fromfile(
      self.path,
      self.dtype,
      count=(stop - start) * row_elements,
      offset=self.offset + start * row_elements * self.dtype.itemsize,
    )
    return values.reshape(stop - start, *self.shape[1:])

  def read_all(self) -> np.ndarray:
    """The whole tensor; it has at least one axis."""
    return self.read(0, self.shape[0])


def read_header(path: Path) -> dict[str, Entry]:
  """The tensors of a file by name.

  Raises:
    ValueError: not a safetensors file, truncated, or a header that does not fit
      the file: sizes, offsets, gaps, overlaps. Names file and tensor.
  """
  file_bytes = path.stat().st_size
  with path.open('rb') as f:
    header_bytes = int.from_bytes(f.read(8), 'little')
    if file_bytes < 8 or header_bytes > min(file_bytes - 8, _MAX_HEADER_BYTES):
      raise ValueError(
        f'{path}: the header is said to have {header_bytes:,} bytes in a '
        f'file of {file_bytes:,}; it is truncated or not a safetensors file.'
      )
    try:
      header = files.parse_json(f.read(header_bytes))
      header.pop('__metadata__', None)
      spans = sorted(_span(name, entry) for name, entry in header.items())
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as e:
      raise ValueError(
        f'{path}: the header is not the JSON object of a safetensors file ({e}).'
      ) from None
  data_bytes = file_bytes - 8 - header_bytes
  position = 0
  entries = {}
  for begin, end, name, dtype_name, shape in spans:
    if dtype_name not in _ITEM_BYTES or any(size < 0 for size in shape):
      raise ValueError(
        f'{path}: tensor {name} has dtype {dtype_name!r:.80} and shape '
        f'{list(shape)}, which the format does not know.'
      )
    num_bytes = math.prod(shape) * _ITEM_BYTES[dtype_name]
    if begin != position or end - begin != num_bytes:
      raise ValueError(
        f'{path}: tensor {name} lies at bytes {begin:,} to {end:,}, expected '
        f'{num_bytes:,} bytes from {position:,} on; the header is damaged.'
      )
    entries[name] = Entry(path, name, dtype_name, shape, 8 + header_bytes + begin)
    position = end
  if position != data_bytes:
    raise ValueError(
      f'{path}: the tensors take {position:,} bytes, but the file holds '
      f'{data_bytes:,}; it is truncated or damaged, fetch it again.'
    )
  return entries


def _span(name: str, entry: Any) -> tuple[int, int, str, str, tuple[int, ...]]:
  begin, end = map(int, entry['data_offsets'])
  return begin, end, name, str(entry['dtype']), tuple(map(int, entry['shape']))


def write(path: Path, tensors: Mapping[str, 'base_source.StoredTensor'], dtype: np.dtype):
  """Writes a file, each tensor read in ranges of rows, cast and put in place.

  Args:
    path: to be made.
    tensors: by name, in the order in which to store them.
    dtype: float32 or bfloat16, for all of them.
  """
  (dtype_name,) = (n for n, d in _WEIGHT_DTYPES.items() if d == dtype)
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  offsets = {}
  position = 0
  for name, tensor in tensors.items():
    offsets[name] = position
    position += math.prod(tensor.shape) * dtype.itemsize
    header[name] = {
      'dtype': dtype_name,
      'shape': list(tensor.shape),
      'data_offsets': [offsets[name], position],
    }
  text = files.to_json(header).encode()
  text += b' ' * (-len(text) % 8)  # so that the data is aligned
  with path.open('wb') as f:
    f.write(len(text).to_bytes(8, 'little') + text)
    f.truncate(8 + len(text) + position)
  descriptor = os.open(path, os.O_WRONLY)
  try:
    with futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
      for name, tensor in tensors.items():
        row_bytes = math.prod(tensor.shape[1:]) * dtype.itemsize
        begin = 8 + len(text) + offsets[name]

        def copy(start, tensor=tensor, row_bytes=row_bytes, begin=begin):
          stop = min(start + base_source.chunk_rows(tensor.shape), tensor.shape[0])
          rows = finite.narrow(tensor.read(start, stop), dtype, tensor.name, 'output', start)
          rows = np.ascontiguousarray(rows, dtype)
          _write_at(descriptor, rows.reshape(-1).view(np.uint8), begin + start * row_bytes)

        step = base_source.chunk_rows(tensor.shape)
        for _ in pool.map(copy, range(0, tensor.shape[0], step)):
          pass  # raises what a thread raised
  finally:
    os.close(descriptor)


def _write_at(descriptor: int, content: np.ndarray, offset: int):
  """Calls os.pwrite until all is written; a full disk is an OSError."""
  view = content.data
  while view:
    written = os.pwrite(descriptor, view, offset)
    view, offset = view[written:], offset + written
