"""Parts of leaves on a mesh, filled chunk by chunk, make the whole leaf."""

from pathlib import Path
import subprocess
import sys

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from gemma_jax.config.train import MeshConfig
from gemma_jax.formats import parts as parts_lib
from gemma_jax.formats.parts import Part
from gemma_jax.training import sharding

ROOT = Path(__file__).parents[2]
SHAPE = (12, 10, 8)
WHOLE = np.arange(12 * 10 * 8, dtype=np.float32).reshape(SHAPE)


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize(
  ('spec', 'different'),
  [((), 1), (('fsdp',), 2), ((None, 'tensor', 'fsdp'), 4), (('tensor', None, ('data', 'fsdp')), 8)],
)
@pytest.mark.parametrize('order', [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize('rows', [1, 5, 12])
def test_chunks_fill_every_part(mesh, spec, different, order, rows):
  """Chunks of the stored order, of which each part takes its own."""
  placed = NamedSharding(mesh, PartitionSpec(*spec))
  by_device = parts_lib.make_parts(SHAPE, np.dtype(np.float32), placed)
  parts = {id(part): part for part in by_device.values()}
  assert len(parts) == different
  stored = WHOLE.transpose(order)
  for start in range(0, len(stored), rows):
    chunk = stored[start : start + rows]
    for part in parts.values():
      part.transpose(order).take(chunk, start)
  leaf = parts_lib.to_devices(by_device, SHAPE, placed)
  assert leaf.sharding == placed
  np.testing.assert_array_equal(leaf, WHOLE)


def test_a_layer_of_a_part():
  part = Part(((4, 6), (3, 7)), np.zeros((2, 4)))
  assert [i for i in range(12) if part.meets(i, i + 1)] == [4, 5]
  assert not part.meets(0, 4)
  part.layer(5).take(np.arange(10.0), 0)
  np.testing.assert_array_equal(part.out, [[0, 0, 0, 0], [3, 4, 5, 6]])


def test_on_the_cpu_nothing_is_copied_once_more():
  """The leaf is the memory that was filled."""
  device = jax.sharding.SingleDeviceSharding(jax.devices()[3])
  by_device = parts_lib.make_parts((40, 50), np.dtype(np.float32), device)
  (part,) = by_device.values()
  part.take(np.ones((40, 50), np.float32), 0)
  leaf = parts_lib.to_devices(by_device, (40, 50), device)
  assert leaf.unsafe_buffer_pointer() == part.out.ctypes.data


MEASURE = """
import jax

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
from gemma_jax import pytree
from gemma_jax.config.train import MeshConfig
from gemma_jax.formats import open_base
from gemma_jax.model import layout
from gemma_jax.runs import metrics
from gemma_jax.training import sharding

base = open_base.open_base('random:gemma3_270m')
mesh = sharding.make_mesh(MeshConfig(fsdp=8))
abstract = {'params': layout.abstract_params(base.config)}
placed = sharding.tree_shardings(abstract, base.config, mesh)['params']
before = metrics.peak_memory_bytes()
params = base.load_params('float32', shardings=placed)
print(metrics.peak_memory_bytes() - before, pytree.num_bytes(params))
"""


@pytest.mark.slow
def test_peak_memory_of_a_load_is_its_result():
  """Of 1.07 GB over eight devices; a process of its own, for its peak."""
  out = subprocess.run(
    [sys.executable, '-c', MEASURE], cwd=ROOT, capture_output=True, text=True, check=True
  ).stdout
  grown, result = map(int, out.split())
  assert grown < 1.05 * result
