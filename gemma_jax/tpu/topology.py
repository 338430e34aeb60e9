"""A TPU slice by name, as devices to compile for, on any machine.

    v5e:1x1      one chip
    v5e:2x4      eight chips of one slice, what gcloud calls v5litepod-8
    v4:2x2x1     four chips in three dimensions, v4-8
    2xv5e:4x4    two slices of sixteen, joined by the data centre's network

libtpu (extra `tpu`) has the compiler; no TPU is needed.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax

from gemma_jax.tpu import chips
from gemma_jax.tpu.chips import Chip

_MAX_CHIPS = {2: 256, 3: 9216}  # a pod, by its dimensions
# Slice shapes that Cloud TPU offers, up to 64 chips or so.
CLOUD_SHAPES = {
  'v3': ('2x2', '4x4', '4x8', '8x8'),
  'v4': ('2x2x1', '2x2x2', '2x2x4', '4x4x4'),
  'v5e': ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '16x16'),
  'v5p': ('2x2x1', '2x2x2', '2x2x4', '4x4x4'),
  'v6e': ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '16x16'),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """One or several equal slices.

  Attributes:
    chip: their version.
    shape: chips along each dimension of a slice.
    num_slices: how many.
  """

  chip: Chip
  shape: tuple[int, ...]
  num_slices: int = 1

  @property
  def num_devices(self) -> int:
    """As JAX counts them."""
    chips_per_slice = math.prod(self.shape)
    return chips_per_slice * self.num_slices * self.chip.devices_per_chip

  def __str__(self) -> str:
    slices = f'{self.num_slices}x' if self.num_slices > 1 else ''
    return f'{slices}{self.chip.name}:{"x".join(map(str, self.shape))}'

  def devices(self) -> list[Any]:
    """Devices to make a mesh of; they can only be compiled for.

    Raises:
      ValueError: libtpu is not installed, or does not know this slice.
    """
    if importlib.util.find_spec('libtpu') is None:
      raise ValueError(
        f'topology: got {self}, but libtpu, which compiles for a TPU, is not '
        "installed. pip install -e '.[tpu]'"
      )
    from jax.experimental import topologies

    # libtpu asks the network which TPU this machine is part of, unless it is told;
    # any answer will do. And it allows one process at a time, which only matters
    # when a TPU is used.
    for key, value in (
      ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'),
      ('TPU_SKIP_MDS_QUERY', '1'),
      ('TPU_WORKER_HOSTNAMES', 'localhost'),
      ('TPU_WORKER_ID', '0'),
      ('TPU_ACCELERATOR_TYPE', 'v5litepod-8'),
    ):
      os.environ.setdefault(key, value)
    try:
      description = topologies.get_topology_desc(
        platform='tpu',
        topology_name=f'{self.chip.name}:{"x".join(map(str, self.shape))}',
        **self._options(),
      )
    except (jax.errors.JaxRuntimeError, NotImplementedError) as e:
      raise ValueError(
        f'topology: got {self}, which libtpu rejects ({_first_line(e)}); expected {known()}.'
      ) from None
    if len(description.devices) != self.num_devices:
      raise ValueError(
        f'topology: got {self}, for which libtpu has {len(description.devices)} '
        f'devices instead of {self.num_devices}; expected {known()}.'
      )
    return description.devices

  def _options(self) -> dict[str, Any]:
    options: dict[str, Any] = {'num_slices': self.num_slices}
    if self.chip.name == 'v4':  # both cores of a chip as one device
      options['chip_config_name'] = 'megacore'
    bounds = (*self.shape, 1)[:3]
    host = (2, 2, 1)  # of every version; a slice may be smaller
    if any(size % part for size, part in zip(bounds, host, strict=True)):
      options['chips_per_host_bounds'] = bounds
    return options


def parse(name: str) -> Topology:
  """`v5e:2x4` or `2xv5e:2x4` → a topology.

  Raises:
    ValueError: there is no such name; lists the names.
  """
  match = re.fullmatch(r'(?:(\d+)x)?(v\w+):(\d+(?:x\d+)+)', name)
  chip = chips.CHIPS.get(match[2]) if match else None
  if match is None or chip is None:
    raise ValueError(f'topology: got {name!r}, expected {known()}.')
  num_slices = int(match[1] or 1)
  shape = tuple(map(int, match[3].split('x')))
  if len(shape) != chip.dimensions or not 0 < math.prod(shape) <= _MAX_CHIPS[chip.dimensions]:
    raise ValueError(
      f'topology: got {name!r}, expected {chip.dimensions} sizes and at most '
      f'{_MAX_CHIPS[chip.dimensions]} chips for {chip.name}, such as '
      f'{chip.name}:{CLOUD_SHAPES[chip.name][2]}.'
    )
  if num_slices < 1 or (num_slices > 1 and chip.dcn_bytes_per_sec is None):
    raise ValueError(f'topology: got {num_slices} slices of {chip.name}, expected one.')
  return Topology(chip, shape, num_slices)


def known() -> str:
  """The known names, for messages."""
  names = '; '.join(f'{name}:{"|".join(shapes)}' for name, shapes in CLOUD_SHAPES.items())
  return f'one of {names}; with Nx in front for several slices, as in 2xv5e:4x4'


def _first_line(e: Exception) -> str:
  return str(e).strip().split('\n')[0]
