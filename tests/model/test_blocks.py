"""Attention in blocks equals einsum, and leaves out what nobody sees."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from gemma_jax.config.train import MeshConfig
from gemma_jax.model import attention, blocks
from gemma_jax.training import sharding
from tests.model.test_splash import assert_equals_einsum, make, output_and_gradients

pytestmark = [
  pytest.mark.usefixtures('strict', 'quick_compile'),
  pytest.mark.filterwarnings('error'),
]


@pytest.mark.parametrize(
  ('length', 'window', 'cap'), [(37, None, None), (128, 9, None), (300, None, 3.0), (300, 150, 3.0)]
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


@pytest.mark.parametrize('length', [300, 1024])
def test_equals_einsum_on_a_mesh(length):
  """Rows over two axes, the heads over a third; long rows choose together."""
  mesh_config = MeshConfig(data=2, fsdp=2, tensor=2)
  mesh = sharding.make_mesh(mesh_config)
  _, (*heads, positions, segments) = make(mesh_config, 4, length, 4, 2)
  rows = sharding.batch_sharding(mesh)
  by_head = NamedSharding(mesh, PartitionSpec(sharding.BATCH, None, sharding.RULES.axis('N')))
  arrays = (*jax.device_put(heads, by_head), *jax.device_put((positions, segments), rows))
  assert_equals_einsum(blocks.attend, arrays, 150, 3.0)


def test_bfloat16_is_nearly_as_near_to_float32_as_einsum_is():
  """The gradients of k and v are rounded for each block of queries."""
  _, arrays = make(MeshConfig(fsdp=1), 2, 300, 4, 2)
  half = *(x.astype(jnp.bfloat16) for x in arrays[:3]), *arrays[3:]
  exact = *(x.astype(jnp.float32) for x in half[:3]), *half[3:]
  (_, want), want_grads = output_and_gradients(attention.attend_by_einsum, None, None, *exact)

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
  ('length', 'window', 'share'),
  [(512, None, (1 + 4) / 8), (1024, 128, 2 / 8)],  # of n blocks, for each
)
def test_keys_that_nobody_can_see_are_not_multiplied(length, window, share):
  _, arrays = make(MeshConfig(fsdp=1), 1, length, 4, 1)

  def work(attend):
    lowered = output_and_gradients.lower(attend, window, None, *arrays)
    return lowered.compile().cost_analysis()['flops']

  ratio = work(blocks.attend) / work(attention.attend_by_einsum)
  assert ratio == pytest.approx(share, rel=0.06)


def packed(*rows):
  """q, k, v, positions, segment ids; a row is the lengths of its segments."""
  _, (*heads, _, _) = make(MeshConfig(fsdp=1), len(rows), sum(rows[0]), 4, 2)
  positions = [np.concatenate([np.arange(n) for n in row]) for row in rows]
  ids = [np.repeat(np.arange(len(row)) + 1, row) for row in rows]
  return *heads, jnp.asarray(np.stack(positions)), jnp.asarray(np.stack(ids))


# The last of a row's 8 blocks begins at 896, and has programs for 1, 3 and 7
# blocks of keys before it; a window's own edge is nearer.
PACKED = [
  ([(896, 128)], None, 768),
  ([(768, 256)], None, 768),
  ([(300, 468, 256)], None, 768),
  ([(767, 257)], None, 512),
  ([(511, 513)], None, 0),
  ([(1024,)], None, 0),
  ([(896, 128), (512, 512)], None, 512),  # the longest of all rows' segments
  ([(1024,)], 200, 697),
  ([(800, 224)], 200, 768),
]


@pytest.mark.parametrize(('rows', 'window', 'first'), PACKED)
def test_keys_before_a_segment_are_not_read(rows, window, first):
  """A NaN that is read is seen, since 0 x NaN is NaN."""
  q, k, v, *context = packed(*rows)
  for poisoned, finite in (first, True), (first + 1, False):
    arrays = q, k, v.at[:, :poisoned].set(np.nan), *context
    (_, out), _ = output_and_gradients(blocks.attend, window, None, *arrays)
    assert np.all(np.isfinite(out[:, 896:])) == finite


@pytest.mark.parametrize(
  ('rows', 'window'),
  [
    ([(300, 468, 256)], None),
    ([(511, 513)], None),
    ([(896, 128), (512, 512)], None),
    ([(800, 224)], 200),
    ([(300, 600, 200)], None),  # 1100: the last block has 76 queries
  ],
)
def test_packed_rows_equal_einsums(rows, window):
  assert_equals_einsum(blocks.attend, packed(*rows), window, 3.0)


def test_padding_before_a_segment_equals_einsums():
  """A block whose first query is padding, and one that is all padding."""
  q, k, v, positions, ids = packed((300, 724), (100, 924))
  ids = jnp.where(ids == 1, 0, ids)
  assert_equals_einsum(blocks.attend, (q, k, v, positions, ids), None, None)


def test_members_of_a_gang_choose_once():
  """Keys and values mapped, segments not: one program runs, not all."""
  q, k, v, *context = packed((300, 724))

  def attend(q, k, v):
    return output_and_gradients(blocks.attend, None, None, q, k, v, *context)

  mapped = jax.make_jaxpr(jax.vmap(attend))(*(x[None] for x in (q, k, v)))
  assert ' cond[' in str(mapped)
