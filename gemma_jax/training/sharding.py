"""Where arrays live: the mesh, and one table from axis letters to mesh axes.

Mesh axes: `data` (replicas), `fsdp` (parameters and batch), `tensor` (heads,
MLP width, vocabulary). Batches are split over data x fsdp. Adapters and their
moments are small and replicated, or split as the base is
(`mesh.shard_adapter`); moments are placed like the leaves they belong to.

Several slices are connected by a slower network, which only `data` crosses, so
that it carries one sum of gradients per update and no parameters.
"""

from collections.abc import Sequence
import dataclasses
import math
import re
from typing import Any

from absl import logging
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from gemma_jax import pytree
from gemma_jax.config.train import LoraConfig, MeshConfig
from gemma_jax.lora import factors
from gemma_jax.model import layout
from gemma_jax.model.config import ModelConfig

AXES = ('data', 'fsdp', 'tensor')
BATCH = ('data', 'fsdp')


@dataclasses.dataclass(frozen=True)
class Rules:
  """The mesh axis over which each axis letter is split, or None.

  Attributes are the letters of `gemma_jax.model`.
  """

  V: str | None = 'tensor'
  D: str | None = 'fsdp'
  F: str | None = 'tensor'
  N: str | None = 'tensor'
  K: str | None = 'tensor'
  H: str | None = None
  L: str | None = None
  R: str | None = None

  def axis(self, letter: str) -> str | None:
    """The mesh axis of a letter; None also for letters that no parameter has."""
    return getattr(self, letter, None)

  def axes(self, letters: str) -> list[str | None]:
    """The mesh axis of each letter of a parameter.

    Raises:
      ValueError: two of its letters would be split over one mesh axis.
    """
    axes = [self.axis(letter) for letter in letters]
    for axis in AXES:
      both = [c for c, a in zip(letters, axes, strict=True) if a == axis]
      if len(both) > 1:
        raise ValueError(
          f'sharding rules: {" and ".join(both)} of a parameter [{letters}] '
          f'are both split over mesh axis {axis}, expected one; set the other to None.'
        )
    return axes


RULES = Rules()


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh (data, fsdp, tensor); -1 takes the remaining devices.

  On a single host, sizes that ask for fewer devices than there are take the
  first ones, with a warning.

  Args:
    config: the sizes.
    devices: by default all that JAX sees.

  Raises:
    ValueError: the sizes do not fit the number of devices, or `data` does not
      fit the number of slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [config.data, config.fsdp, config.tensor]
  if -1 in sizes:
    known = math.prod(s for s in sizes if s != -1)
    sizes[sizes.index(-1)] = max(len(devices) // known, 1)
  count = math.prod(sizes)
  fewer = count < len(devices) and -1 not in (config.data, config.fsdp, config.tensor)
  if count != len(devices) and not (fewer and jax.process_count() == 1):
    raise ValueError(
      f'mesh: got data={config.data} fsdp={config.fsdp} '
      f'tensor={config.tensor}, expected a product of {len(devices)}, the '
      'number of devices. Set one of them to -1 to fill it.'
    )
  if fewer:
    logging.warning('The mesh uses %d of %d devices.', count, len(devices))
  devices = devices[:count]
  axis_types = (AxisType.Auto,) * len(AXES)
  slices = len({getattr(d, 'slice_index', 0) for d in devices})
  if slices == 1:
    return jax.make_mesh(tuple(sizes), AXES, axis_types=axis_types, devices=devices)
  if sizes[0] % slices:
    raise ValueError(
      f'mesh.data: got {sizes[0]}, expected a multiple of {slices}, the number '
      'of slices; a replica does not span slices.'
    )
  from jax.experimental import mesh_utils

  grid = mesh_utils.create_hybrid_device_mesh(
    (sizes[0] // slices, *sizes[1:]), (slices, 1, 1), devices
  )
  return Mesh(grid, AXES, axis_types=axis_types)


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """For [B, T] and [B, T, D]: rows over data x fsdp."""
  return NamedSharding(mesh, PartitionSpec(BATCH))


def batch_parts(mesh: Mesh) -> int:
  """Number of parts into which the rows of a batch are split."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def check_batch(mesh: Mesh, rows: int, name: str) -> None:
  """ValueError unless the rows divide over data x fsdp."""
  parts = batch_parts(mesh)
  if rows % parts:
    raise ValueError(
      f'{name}: got {rows} rows at a time, expected a multiple of data x fsdp = {parts}.'
    )


def param_spec(letters: str, sizes: dict[str, int], mesh: Mesh):
  """Letters → PartitionSpec, by `RULES`.

  A grouped-query model may have fewer kv heads than tensor shards; they are then
  replicated (each shard needs them whole).

  Raises:
    ValueError: a size that its mesh axis does not divide.
  """
  spec = []
  for letter, axis in zip(letters, RULES.axes(letters), strict=True):
    parts = 1 if axis is None else mesh.shape[axis]
    fits = parts == 1 or sizes[letter] % parts == 0
    if not fits and letter != 'K':
      divisors = [d for d in range(1, 65) if sizes[letter] % d == 0]
      raise ValueError(
        f'mesh.{axis}: got {parts}, expected a divisor of axis '
        f'{letter} = {sizes[letter]}; up to 64 these are {divisors}.'
      )
    spec.append(axis if parts > 1 and fits else None)
  return PartitionSpec(*spec)


def tree_shardings(
  tree: Any, config: ModelConfig, mesh: Mesh, split_lora: LoraConfig | None = None
) -> Any:
  """A NamedSharding for every leaf of variables, state or optimizer state.

  A leaf belongs to the base if its path ends with 'params/' and a path of
  `layout.param_axes`, whatever comes before (`opt_state/.../mu/params/...`), and
  to the adapter likewise with 'lora/'; all else is replicated.

  Args:
    tree: arrays or `jax.ShapeDtypeStruct`s.
    config: architecture.
    mesh: from `make_mesh`.
    split_lora: splits an adapter of this config as the base is split; None
      replicates the adapter.
  """
  sizes = layout.axis_sizes(config)
  axes = {}
  for scan in (True, False):
    for name, letters in layout.param_axes(config, scan).items():
      axes[f'params/{name}'] = letters
    if split_lora is not None:
      for name, letters in factors.leaf_axes(config, split_lora, scan).items():
        axes[f'lora/{name}'] = letters

  def leaf(name, x):
    match = re.search(r'(?:^|/)((?:params|lora)/.*)$', name)
    letters = axes.get(match[1], '') if match else ''
    if len(letters) != np.ndim(x):
      return replicated(mesh)
    return NamedSharding(mesh, param_spec(letters, sizes, mesh))

  return pytree.map_with_name(leaf, tree)


def local_rows(mesh: Mesh, num_rows: int) -> np.ndarray:
  """Rows of a global batch that this process's devices hold, ascending.

  They need not be contiguous, nor held here alone: with `tensor` across
  processes, several hold the same rows.
  """
  indices = batch_sharding(mesh).addressable_devices_indices_map((num_rows,))
  rows = np.arange(num_rows)
  return np.unique(np.concatenate([rows[i] for i in indices.values()]))


def put_batch(batch: Any, mesh: Mesh, num_rows: int | None = None) -> Any:
  """Rows of this process → the global batch [B, ...] on the mesh.

  Args:
    batch: a pytree of arrays with all B rows, or only those of `local_rows`.
    mesh: from `make_mesh`.
    num_rows: B; None means that the arrays have all rows.
  """
  sharding = batch_sharding(mesh)

  def place(x):
    count = num_rows or len(x)
    rows = np.arange(count)
    have = rows if len(x) == count else local_rows(mesh, count)

    def part(index: tuple[slice, ...] | None):
      assert index is not None  # a device of this process has a part
      return x[np.isin(have, rows[index[0]])]

    return jax.make_array_from_callback((count, *x.shape[1:]), sharding, part)

  return jax.tree.map(place, batch)


def put(tree: Any, shardings: Any) -> Any:
  """Arrays that every process has whole → the same on a mesh."""

  def place(x, sharding):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  return jax.tree.map(place, tree, shardings)
