"""Attention in blocks equals einsum, and leaves out what nobody sees."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from gemma_jax import sharding
from gemma_jax.config import MeshConfig
from gemma_jax.model import attention, blocks
from tests.test_splash import assert_equals_einsum, make, output_and_gradients

pytestmark = [
  pytest.mark.usefixtures('strict', 'quick_compile'),
  pytest.mark.filterwarnings('error'),
]


@pytest.mark.parametrize(
  ('length', 'window', 'cap'),
  [(37, None, None), (128, 9, None), (300, None, 3.0), (300, 150, 3.0)],
)
def test_equals_einsum(length, window, cap):
  """One block, a whole one, and a last one that is short."""
  _, arrays = make(MeshConfig(fsdp=1), 2, length, 4, 2)
  assert_equals_einsum(blocks.attend, arrays, window, cap)


@pytest.mark.parametrize('window', [1, 2, 9, 128, 129, 150, 299])
def test_the_window_of_one_long_segment_starts_where_einsums_does(window):
  """No segment's start hides which keys a block's first query sees."""
  _, (q, k, v, positions, _) = make(MeshConfig(fsdp=1), 2, 300, 4, 2)
  positions = jnp.broadcast_to(jnp.arange(300), positions.shape)
  arrays = q, k, v, positions, jnp.ones_like(positions)
  assert_equals_einsum(blocks.attend, arrays, window, None)


def test_equals_einsum_on_a_mesh():
  """Rows over two axes, the heads over a third."""
  mesh_config = MeshConfig(data=2, fsdp=2, tensor=2)
  mesh = sharding.make_mesh(mesh_config)
  _, (*heads, positions, segments) = make(mesh_config, 4, 300, 4, 2)
  rows = sharding.batch_sharding(mesh)
  by_head = NamedSharding(
    mesh,
    PartitionSpec(sharding.BATCH, None, sharding.RULES.axis('N')),
  )
  arrays = (
    *jax.device_put(heads, by_head),
    *jax.device_put((positions, segments), rows),
  )
  assert_equals_einsum(blocks.attend, arrays, 150, 3.0)


def test_bfloat16_is_nearly_as_near_to_float32_as_einsum_is():
  """The gradients of k and v are rounded for each block of queries."""
  _, arrays = make(MeshConfig(fsdp=1), 2, 300, 4, 2)
  half = *(x.astype(jnp.bfloat16) for x in arrays[:3]), *arrays[3:]
  exact = *(x.astype(jnp.float32) for x in half[:3]), *half[3:]
  (_, want), want_grads = output_and_gradients(
    attention.attend_by_einsum, None, None, *exact
  )

  def error(attend):
    (_, out), grads = output_and_gradients(attend, None, None, *half)
    assert all(x.dtype == jnp.bfloat16 for x in (out, *grads))
    return np.array(
      [
        np.linalg.norm(np.asarray(x, np.float32) - y)
        for x, y in zip((out, *grads), (want, *want_grads), strict=True)
      ]
    )

  got, einsum = error(blocks.attend), error(attention.attend_by_einsum)
  assert np.all(got <= einsum * [1.01, 1.01, 1.5, 1.5])  # of o, q, k, v


@pytest.mark.parametrize(
  ('window', 'share'),
  [(None, (1 + 8) / 16), (128, 2 / 8)],  # of 8 blocks, for each block of 8
)
def test_blocks_of_keys_that_nobody_sees_are_not_multiplied(window, share):
  _, arrays = make(MeshConfig(fsdp=1), 1, 1024, 4, 1)

  def work(attend):
    lowered = output_and_gradients.lower(attend, window, None, *arrays)
    return lowered.compile().cost_analysis()['flops']

  ratio = work(blocks.attend) / work(attention.attend_by_einsum)
  assert ratio == pytest.approx(share, rel=0.06)
