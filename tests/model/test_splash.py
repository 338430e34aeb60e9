"""The splash kernel equals einsum, forward and backward, on any mesh."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.config.train import MeshConfig
from gemma_jax.model import attention, splash
from gemma_jax.training import sharding
from tests import toy

pytestmark = [
  pytest.mark.usefixtures('strict', 'quick_compile'),
  pytest.mark.filterwarnings('error'),
]

H = 16


def make(mesh_config, rows, length, heads, kv_heads):
  """(attend, arrays): q, k, v and packed segments that end in padding."""
  mesh = sharding.make_mesh(mesh_config)
  attend = splash.Splash(mesh, sharding.BATCH, sharding.RULES.axis('N'), interpret=True)
  rng = np.random.default_rng(length)
  q, k, v = (
    jnp.asarray(rng.standard_normal((rows, length, n, H), np.float32))
    for n in (heads, kv_heads, kv_heads)
  )
  batch = toy.batch(rows=rows, length=length)
  return attend, (q, k, v, batch['positions'], batch['segment_ids'])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def output_and_gradients(attend, window, cap, q, k, v, positions, segments):
  def total(q, k, v):
    context = attention.Context(None, None, positions, segments, positions, segments, None)
    out = attend(q, k, v, context, window, cap)
    return jnp.sum(jnp.sin(out)), out

  return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)


def assert_equals_einsum(attend, arrays, window, cap):
  (_, out), grads = output_and_gradients(attend, window, cap, *arrays)
  (_, want), want_grads = output_and_gradients(attention.attend_by_einsum, window, cap, *arrays)
  toy.assert_close(
    dict(zip('oqkv', (out, *grads), strict=True)),
    dict(zip('oqkv', (want, *want_grads), strict=True)),
    1e-5,
  )


@pytest.mark.parametrize(
  ('kv_heads', 'window', 'cap'), [(1, None, None), (2, 7, 2.0), (6, 1, None)]
)
def test_equals_einsum(kv_heads, window, cap):
  """Gemma's three kinds of heads; rows that fill no block."""
  attend, arrays = make(MeshConfig(fsdp=1), 2, 37, 6, kv_heads)
  assert_equals_einsum(attend, arrays, window, cap)


@pytest.mark.parametrize('window', [None, 150])
def test_equals_einsum_over_several_blocks(window):
  attend, arrays = make(MeshConfig(fsdp=1), 1, 521, 2, 1)
  assert_equals_einsum(attend, arrays, window, 3.0)


@pytest.mark.parametrize('kv_heads', [1, 3, 6])
def test_equals_einsum_on_a_mesh(kv_heads):
  """Three kv heads do not split over two shards of six query heads."""
  mesh_config = MeshConfig(data=2, fsdp=2, tensor=2)
  attend, arrays = make(mesh_config, 4, 37, 6, kv_heads)
  assert_equals_einsum(attend, arrays, 7, None)


def test_padding_gives_zeros_and_takes_no_gradient():
  attend, arrays = make(MeshConfig(fsdp=1), 2, 37, 6, 2)
  padding = np.asarray(arrays[-1]) == 0
  assert padding.any()
  (_, out), (dq, dk, dv) = output_and_gradients(attend, None, None, *arrays)
  for array in (out, dq, dk, dv):
    assert not np.asarray(array)[padding].any()


@pytest.mark.parametrize('head_dim', [16, 256])
def test_lowers_for_a_tpu(head_dim):
  """Mosaic takes the kernels, both directions, where there is no TPU."""
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2))
  attend = splash.Splash(mesh, sharding.BATCH, sharding.RULES.axis('N'))
  rows = sharding.batch_sharding(mesh)
  shapes = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
    for shape, dtype in (
      ((2, 1000, 8, head_dim), jnp.bfloat16),
      ((2, 1000, 1, head_dim), jnp.bfloat16),
      ((2, 1000, 1, head_dim), jnp.bfloat16),
      ((2, 1000), jnp.int32),
      ((2, 1000), jnp.int32),
    )
  ]
  step = jax.jit(functools.partial(output_and_gradients, attend, 300, 50.0))
  text = jax.export.export(step, platforms=['tpu'])(*shapes).mlir_module()
  assert text.count('tpu_custom_call') == 3  # forward, dq, dk and dv
