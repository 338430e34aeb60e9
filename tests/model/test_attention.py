"""Masks by rule, the einsum path against float64, and rows that see nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.model import attention
from tests import toy

pytestmark = [
  pytest.mark.usefixtures('strict', 'quick_compile'),
  pytest.mark.filterwarnings('error'),
]

B, T, S, K, G, H = 2, 5, 11, 3, 7, 13
N = K * G
ATTEND = jax.jit(attention.einsum_attention, static_argnums=4)


def context(q_positions, q_segment_ids, k_positions, k_segment_ids):
  arrays = [
    jnp.array(x, jnp.int32) for x in (q_positions, q_segment_ids, k_positions, k_segment_ids)
  ]
  return attention.Context(None, None, *arrays, index=None)


@pytest.mark.parametrize('window', [None, 1, 3, 100])
def test_visible_by_its_rule(window):
  rng = np.random.default_rng(0)
  q_positions = rng.integers(0, 9, (B, T))
  k_positions = rng.integers(0, 9, (B, S))
  q_segments = rng.integers(0, 3, (B, T))
  k_segments = rng.integers(0, 3, (B, S))
  got = attention.visible(context(q_positions, q_segments, k_positions, k_segments), window)
  assert got.shape == (B, T, S)
  for b in range(B):
    for t in range(T):
      for s in range(S):
        distance = q_positions[b, t] - k_positions[b, s]
        same = q_segments[b, t] == k_segments[b, s] != 0
        near = window is None or distance < window
        assert got[b, t, s] == (same and distance >= 0 and near)


def test_a_window_of_three_is_the_token_itself_and_two_before():
  row = np.arange(6)[None]
  got = attention.visible(context(row, row * 0 + 1, row, row * 0 + 1), 3)
  np.testing.assert_array_equal(
    got[0].astype(np.int32),
    [
      [1, 0, 0, 0, 0, 0],
      [1, 1, 0, 0, 0, 0],
      [1, 1, 1, 0, 0, 0],
      [0, 1, 1, 1, 0, 0],
      [0, 0, 1, 1, 1, 0],
      [0, 0, 0, 1, 1, 1],
    ],
  )


@pytest.fixture(scope='module')
def case():
  """q, k, v, and a mask whose query 3 of row 1 sees no key."""
  rng = np.random.default_rng(1)
  q = rng.standard_normal((B, T, N, H), np.float32)
  k = rng.standard_normal((B, S, K, H), np.float32)
  v = rng.standard_normal((B, S, K, H), np.float32)
  mask = rng.random((B, T, S)) < 0.6
  mask[1, 3] = False
  return q, k, v, mask


def reference(q, k, v, mask, cap):
  """A loop over heads in float64; query head n uses kv head n // G."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros((B, T, N, H))
  for n in range(N):
    scores = q[:, :, n] @ k[:, :, n // G].swapaxes(1, 2)
    if cap is not None:
      scores = cap * np.tanh(scores / cap)
    weights = np.where(mask, np.exp(scores), 0.0)
    total = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, total, where=total > 0, out=weights * 0)
    out[:, :, n] = weights @ v[:, :, n // G]
  return out


@pytest.mark.parametrize('cap', [None, 2.0])
def test_einsum_attention_equals_float64(case, cap):
  got = ATTEND(*map(jnp.asarray, case), cap)
  toy.assert_close(got, reference(*case, cap), 1e-5)


def test_bfloat16_inputs_keep_a_float32_softmax(case):
  *qkv, mask = case
  qkv = [jnp.asarray(x, jnp.bfloat16) for x in qkv]
  qkv[0] *= 3  # scores of up to 40, whose exponents bfloat16 cannot hold
  got = ATTEND(*qkv, jnp.asarray(mask), None)
  assert got.dtype == jnp.bfloat16
  toy.assert_close(got, reference(*qkv, mask, None), 0.02)


def test_a_query_that_sees_nothing_gives_zeros_and_no_nan_gradient(case):
  *qkv, mask = (jnp.asarray(x) for x in case)

  @jax.jit
  @jax.grad
  def gradients(qkv):
    return jnp.sum(attention.einsum_attention(*qkv, mask, 2.0) ** 2)

  out = ATTEND(*qkv, mask, 2.0)
  np.testing.assert_array_equal(out[1, 3], np.zeros((N, H)))
  grads = gradients(qkv)
  for grad in grads:
    assert np.isfinite(grad).all()
  np.testing.assert_array_equal(grads[0][1, 3], np.zeros((N, H)))


def test_an_empty_cache_is_invisible():
  cache = attention.init_cache(toy.FULL, B, S, jnp.bfloat16)
  K, H = toy.FULL.num_kv_heads, toy.FULL.head_dim
  assert cache.k.shape == cache.v.shape == (toy.FULL.num_layers, B, S, K, H)
  assert cache.k.dtype == jnp.bfloat16
  ones = np.ones((B, T), np.int32)
  seen = attention.visible(context(ones * 5, ones, cache.positions, cache.segment_ids), None)
  assert not seen.any()
