"""The parts of a leaf that devices of this process hold, filled by chunks.

    sharding      fsdp over D, 2 devices here      leaf [N, D, H]
    parts         [N, 0:D/2, H] and [N, D/2:D, H]

Each chunk read goes to every part that needs some of it, so a file is read once,
whatever the mesh, and no process has the whole of a leaf that is split.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
import numpy as np

# An XLA buffer on the CPU can be a NumPy array's own memory if it begins at a
# multiple of this.
_ALIGNMENT_BYTES = 64
_LINE_BYTES = 64  # of the CPU cache


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of a leaf: which part, and the memory for it.

  Attributes:
    index: for each axis of the leaf, where the part begins and ends.
    out: array of the sizes that these imply.
  """

  index: tuple[tuple[int, int], ...]
  out: np.ndarray

  @classmethod
  def whole(cls, out: np.ndarray) -> 'Part':
    """The part that is all of an array."""
    return cls(tuple((0, size) for size in out.shape), out)

  def meets(self, start: int, stop: int) -> bool:
    """Whether it overlaps [start, stop) of the first axis."""
    low, high = self.index[0]
    return low < stop and start < high

  def layer(self, i: int) -> 'Part':
    """Its slice at index i of the first axis, without that axis."""
    return Part(self.index[1:], self.out[i - self.index[0][0]])

  def transpose(self, order: Sequence[int]) -> 'Part':
    """The same with its axes in another order (a view)."""
    return Part(tuple(self.index[i] for i in order), self.out.transpose(order))

  def take(self, chunk: np.ndarray, start: int) -> None:
    """Copies what it needs from a chunk.

    Args:
      chunk: part [start, start + len(chunk)) of the first axis, all of the
        others.
      start: as above.
    """
    low, high = self.index[0]
    first, last = max(start, low), min(start + len(chunk), high)
    if first < last:
      rest = (slice(*bounds) for bounds in self.index[1:])
      wanted = chunk[(slice(first - start, last - start), *rest)]
      if self.out.strides[-1] != self.out.itemsize:
        wanted = _spread(wanted)
      self.out[first - low : last - low] = wanted


def _spread(chunk: np.ndarray) -> np.ndarray:
  """A copy whose rows begin a cache line further apart.

  A transposing copy walks down a column. If rows are a power of two bytes long,
  all of a column falls into the same few cache lines.
  """
  gap = _LINE_BYTES // chunk.itemsize
  *rows, columns = chunk.shape
  spread = np.empty((*rows, columns + gap), chunk.dtype)[..., :columns]
  spread[...] = chunk
  return spread


def make_parts(
  shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding
) -> dict[Any, Part]:
  """Allocates memory for what each device of this process holds of a leaf.

  Devices that hold the same part share it.
  """
  parts: dict[tuple, Part] = {}
  by_device = {}
  indices = sharding.addressable_devices_indices_map(shape)
  for device, slices in indices.items():
    assert slices is not None  # each of these devices holds a part
    index = tuple(s.indices(size)[:2] for s, size in zip(slices, shape, strict=True))
    if index not in parts:
      sizes = tuple(stop - start for start, stop in index)
      parts[index] = Part(index, _aligned_empty(sizes, dtype))
    by_device[device] = parts[index]
  return by_device


def to_devices(
  parts: dict[Any, Part], shape: tuple[int, ...], sharding: jax.sharding.Sharding
) -> jax.Array:
  """Makes the leaf from its parts; waits, so that their memory can be freed."""
  arrays = [jax.device_put(part.out, device) for device, part in parts.items()]
  leaf = jax.make_array_from_single_device_arrays(shape, sharding, arrays)
  return leaf.block_until_ready()


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """np.empty whose memory a JAX CPU array can take over."""
  num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
  memory = np.empty(num_bytes + _ALIGNMENT_BYTES, np.uint8)
  offset = -memory.ctypes.data % _ALIGNMENT_BYTES
  return memory[offset : offset + num_bytes].view(dtype).reshape(shape)
