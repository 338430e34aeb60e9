"""The GGUF container: header, metadata, and where each tensor lies.

Layout (little-endian; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):

    'GGUF' | version u32 | tensor count u64 | metadata count u64
    metadata   key string | type u32 | value
    tensors    name string | n u32 | dims u64[n], fastest first | type u32 |
               offset u64 from the data
    padding to general.alignment, then the data

The `gguf` package has a reader too, but it makes two NumPy arrays for each of the
262,144 strings of a vocabulary: 12 s and 0.6 GB, where this reader takes 0.3 s.
"""

from collections.abc import Collection
import dataclasses
import math
import os
from pathlib import Path
import struct
from typing import Any, BinaryIO

import numpy as np

MAGIC = b'GGUF'
_VERSIONS = (2, 3)
_MOST_ENTRIES = 1 << 14  # Gemma 3 27B has 808 tensors
_MOST_AXES = 4
_MOST_ITEMS = 1 << 19  # of an array that is read: twice Gemma's vocabulary
_STRING, _ARRAY = 8, 9
_SCALARS = {
  0: '<u1',
  1: '<i1',
  2: '<u2',
  3: '<i2',
  4: '<u4',
  5: '<i4',
  6: '<f4',
  7: '?',
  10: '<u8',
  11: '<i8',
  12: '<f8',
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
  """Where a tensor lies.

  Attributes:
    shape: slowest axis first, as in NumPy.
    type: number of its GGMLQuantizationType.
    offset: its first byte in the file.
  """

  shape: tuple[int, ...]
  type: int
  offset: int


class _Truncated(Exception):
  pass


class _Cursor:
  """Reads values one after another; never past the end."""

  def __init__(self, f: BinaryIO, size: int):
    self._file, self._left = f, size

  @property
  def position(self) -> int:
    return self._file.tell()

  def _spend(self, num_bytes: int):
    self._left -= num_bytes
    if self._left < 0:
      raise _Truncated

  def take(self, num_bytes: int) -> bytes:
    self._spend(num_bytes)
    return self._file.read(num_bytes)

  def skip(self, num_bytes: int):
    self._spend(num_bytes)
    self._file.seek(num_bytes, os.SEEK_CUR)

  def unpack(self, form: str) -> Any:
    return struct.unpack(form, self.take(struct.calcsize(form)))[0]

  def string(self) -> str:
    return self.take(self.unpack('<Q')).decode('utf-8')

  def value(self, kind: int, wants_array: bool) -> Any:
    """A metadata value; an array that is not wanted is passed over."""
    if kind == _STRING:
      return self.string()
    if kind != _ARRAY:
      return np.frombuffer(self.take(_item_bytes(kind)), _SCALARS[kind])[0].item()
    kind, count = self.unpack('<I'), self.unpack('<Q')
    if wants_array and count > _MOST_ITEMS:
      raise ValueError(f'an array has {count:,} items, expected at most {_MOST_ITEMS:,}.')
    if kind == _STRING and wants_array:
      return [self.string() for _ in range(count)]
    if kind == _STRING:
      for _ in range(count):
        self.skip(self.unpack('<Q'))
    elif wants_array:
      return np.frombuffer(self.take(count * _item_bytes(kind)), _SCALARS[kind]).tolist()
    else:
      self.skip(count * _item_bytes(kind))
    return f'an array of {count}'


def _item_bytes(kind: int) -> int:
  if kind not in _SCALARS:
    raise ValueError(f'a metadata value has type {kind}, which is not supported.')
  return np.dtype(_SCALARS[kind]).itemsize


def read_header(
  path: Path, arrays: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
  """Metadata by key, and tensors by name.

      {'general.architecture': 'gemma3', 'gemma3.block_count': 18, ...}
      {'token_embd.weight': TensorInfo((262144, 640), 8, 7151776), ...}

  Args:
    path: of the file.
    arrays: keys whose arrays are read, as lists, which take many times their bytes
      in the file; of any other array only the number of items is told.

  Raises:
    ValueError: not a GGUF file, an unsupported version, or truncated: the header
      itself or a tensor ends beyond the file.
  """
  size = path.stat().st_size
  with path.open('rb') as f:
    try:
      return _parse(_Cursor(f, size), size, arrays)
    except _Truncated:
      raise ValueError(
        f'{path}: the header continues beyond the {size:,} bytes of the '
        'file; it is truncated or damaged, fetch it again.'
      ) from None
    except ValueError as e:
      raise ValueError(f'{path}: {e}') from None


def _parse(cursor: _Cursor, file_bytes: int, arrays: Collection[str]):
  from gguf.constants import GGML_QUANT_SIZES

  magic, version = cursor.take(4), cursor.unpack('<I')
  if magic != MAGIC or version not in _VERSIONS:
    raise ValueError(
      f'got magic {magic!r} and version {version}, expected {MAGIC!r} and '
      f'one of {_VERSIONS}, little-endian; it is not a GGUF file of a supported version.'
    )
  num_tensors, num_keys = cursor.unpack('<Q'), cursor.unpack('<Q')
  if max(num_tensors, num_keys) > _MOST_ENTRIES:
    raise ValueError(
      f'got {num_tensors:,} tensors and {num_keys:,} metadata keys, expected at most '
      f'{_MOST_ENTRIES:,} of each; the header is damaged.'
    )
  metadata = {}
  for _ in range(num_keys):
    key = cursor.string()
    metadata[key] = cursor.value(cursor.unpack('<I'), key in arrays)
  relative = {}
  for _ in range(num_tensors):
    name = cursor.string()
    if name in relative:
      raise ValueError(f'tensor {name} occurs twice.')
    num_axes = cursor.unpack('<I')
    if num_axes > _MOST_AXES:
      raise ValueError(f'tensor {name} has {num_axes} axes, expected at most {_MOST_AXES}.')
    shape = tuple(reversed([cursor.unpack('<Q') for _ in range(num_axes)]))
    relative[name] = (shape, cursor.unpack('<I'), cursor.unpack('<Q'))

  alignment = metadata.get('general.alignment', 32)
  if not isinstance(alignment, int) or alignment < 1:
    raise ValueError(f'general.alignment: got {alignment!r}, expected >= 1.')
  start = -(-cursor.position // alignment) * alignment
  tensors = {}
  for name, (shape, kind, offset) in relative.items():
    if kind not in GGML_QUANT_SIZES:
      raise ValueError(f'tensor {name} has the unknown type {kind}.')
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block:
      raise ValueError(
        f'tensor {name} has shape {list(shape)}, expected rows of a multiple '
        f'of {block}, the block size of its type.'
      )
    end = start + offset + math.prod(shape) // block * block_bytes
    if end > file_bytes:
      raise ValueError(
        f'tensor {name} ends at byte {end:,} of a file of {file_bytes:,}; it '
        'is truncated, fetch it again.'
      )
    tensors[name] = TensorInfo(shape, kind, start + offset)
  return metadata, tensors
