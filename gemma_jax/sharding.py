"""Where arrays live: the mesh, and one table from axis letters to mesh axes.

Mesh axes: `data` (replicas), `fsdp` (parameters and batch), `tensor` (heads,
MLP width, vocabulary). Batches are split over data x fsdp. Adapters and their
moments are small and replicated; a base leaf that is trained takes its moments
along on its own sharding.
"""

import math
import re
from typing import Any

from absl import logging
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from gemma_jax import layout, pytree
from gemma_jax.config import MeshConfig
from gemma_jax.model_config import ModelConfig

AXES = ('data', 'fsdp', 'tensor')

# Letters without an entry are replicated.
RULES = {'D': 'fsdp', **dict.fromkeys('VNKF', 'tensor')}
BATCH = ('data', 'fsdp')


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
  """A mesh (data, fsdp, tensor); -1 takes the devices that are left.

  Sizes that ask for fewer devices than there are take the first ones, on a
  single host, and say so.

  Args:
    config: sizes.
    devices: default: all that JAX sees.

  Raises:
    ValueError: the sizes do not fit the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [config.data, config.fsdp, config.tensor]
  if -1 in sizes:
    known = math.prod(s for s in sizes if s != -1)
    sizes[sizes.index(-1)] = max(len(devices) // known, 1)
  count = math.prod(sizes)
  fewer = count < len(devices) and -1 not in (
    config.data, config.fsdp, config.tensor
  )  # fmt: skip
  if count != len(devices) and not (fewer and jax.process_count() == 1):
    raise ValueError(
      f'mesh: got data={config.data} fsdp={config.fsdp} '
      f'tensor={config.tensor}, expected a product of {len(devices)}, the '
      'number of devices. Set one of them to -1 to fill it.'
    )
  if fewer:
    logging.warning('The mesh uses %d of %d devices.', count, len(devices))
  return jax.make_mesh(
    tuple(sizes),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=devices[:count],
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of [B, T] and [B, T, D]: rows over data x fsdp."""
  return NamedSharding(mesh, PartitionSpec(BATCH))


def check_batch(mesh: Mesh, rows: int, name: str) -> None:
  """ValueError unless the rows divide over data x fsdp."""
  parts = mesh.shape['data'] * mesh.shape['fsdp']
  if rows % parts:
    raise ValueError(
      f'{name}: got {rows} rows at a time, expected a multiple of '
      f'data x fsdp = {parts}.'
    )


def param_spec(letters: str, sizes: dict[str, int], mesh: Mesh):
  """Letters → PartitionSpec, each mesh axis used once.

  The kv heads of a grouped-query model may be fewer than the tensor shards:
  they are then replicated (each shard needs them whole).

  Raises:
    ValueError: a size that its mesh axis does not divide.
  """
  spec, used = [], set()
  for letter in letters:
    axis = RULES.get(letter)
    if axis is None or axis in used or mesh.shape[axis] == 1:
      spec.append(None)
      continue
    if sizes[letter] % mesh.shape[axis]:
      if letter == 'K':
        spec.append(None)
        continue
      divisors = [d for d in range(1, 65) if sizes[letter] % d == 0]
      raise ValueError(
        f'mesh.{axis}: got {mesh.shape[axis]}, expected a divisor of axis '
        f'{letter} = {sizes[letter]}; up to 64 these are {divisors}.'
      )
    spec.append(axis)
    used.add(axis)
  return PartitionSpec(*spec)


def tree_shardings(tree: Any, config: ModelConfig, mesh: Mesh) -> Any:
  """A NamedSharding for every leaf of variables, state or optimizer state.

  A leaf belongs to the base if its path runs through 'params/' to a path of
  `layout.param_axes`, wherever that stands (`opt_state/.../mu/params/...`);
  all else is replicated.

  Args:
    tree: arrays or `jax.ShapeDtypeStruct`s.
    config: architecture.
    mesh: from `make_mesh`.
  """
  sizes = layout.axis_sizes(config)
  axes = layout.param_axes(config, True) | layout.param_axes(config, False)

  def leaf(name, x):
    match = re.search(r'(?:^|/)params/(.*)$', name)
    letters = axes.get(match[1], '') if match else ''
    if len(letters) != np.ndim(x):
      return replicated(mesh)
    return NamedSharding(mesh, param_spec(letters, sizes, mesh))

  return pytree.map_with_name(leaf, tree)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This host's rows [B / hosts, T] → the global batch [B, T] on the mesh."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, rows)
    for name, rows in batch.items()
  }
