"""Einsum with its adapter, RMSNorm, embedding, cap, and the MLP's GELU."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.model import adapter
from gemma_jax.model.layers import Einsum, Embedder, RMSNorm, softcap
from gemma_jax.model.transformer import Mlp
from tests import toy

pytestmark = [
  pytest.mark.usefixtures('strict', 'quick_compile'),
  pytest.mark.filterwarnings('error'),
]

B, T, D, F, V, R = 2, 7, 13, 17, 53, 3


def normal(seed, shape, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def rms_norm(x, scale):
  """In float64."""
  x, scale = np.asarray(x, np.float64), np.asarray(scale, np.float64)
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * (1 + scale)


def test_rms_norm_equals_float64():
  x, scale = normal(0, (B, T, D)), normal(1, (D,))
  got = RMSNorm(1e-6).apply({'params': {'scale': scale}}, x)
  np.testing.assert_allclose(got, rms_norm(x, scale), atol=1e-5)


def test_rms_norm_of_bfloat16_is_float32_until_one_cast():
  """(1 + scale) in bfloat16 would lose scale's last bits near 1."""
  x = 30 * normal(0, (B, T, 1031), jnp.bfloat16)
  scale = 0.01 * normal(1, (1031,), jnp.bfloat16)
  apply = lambda x, scale: RMSNorm(1e-6).apply({'params': {'scale': scale}}, x)
  got = apply(x, scale)
  want = apply(x.astype(jnp.float32), scale.astype(jnp.float32))
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


def test_rms_norm_of_zeros_is_zero():
  got = RMSNorm(1e-6).apply({'params': {'scale': jnp.ones(D)}}, jnp.zeros(D))
  np.testing.assert_array_equal(got, np.zeros(D))


@pytest.mark.parametrize(
  ('dtype', 'factor'), [(jnp.bfloat16, 45.25), (jnp.float32, np.float32(math.sqrt(2048)))]
)
def test_embedding_is_scaled_by_the_rounded_root(dtype, factor):
  table = normal(0, (V, 2048), dtype)
  tokens = jnp.array([[3, 52, 0], [7, 7, 1]])
  embedder = Embedder(V, 2048, dtype)
  got = embedder.apply({'params': {'input_embedding': table}}, tokens, method='encode')
  assert got.dtype == dtype
  np.testing.assert_array_equal(got, table[tokens] * jnp.array(factor, dtype))


def test_logits_are_float32_products_with_the_same_table():
  table, x = normal(0, (V, D), jnp.bfloat16), normal(1, (B, T, D), jnp.bfloat16)
  got = Embedder(V, D, jnp.bfloat16).apply(
    {'params': {'input_embedding': table}}, x, method='decode'
  )
  want = np.einsum('BTD,VD->BTV', np.asarray(x, np.float64), np.asarray(table, np.float64))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_softcap():
  x = jnp.array([-1e9, -7.0, 0.0, 0.01, 1e9])
  np.testing.assert_allclose(softcap(x, 5.0), 5 * np.tanh(x / 5), rtol=1e-6)
  assert softcap(x, None) is x


def test_gelu_is_the_tanh_approximation():
  config = toy.PLAIN
  x = normal(0, (B, T, config.embed_dim))
  names = {'gate': 'DF', 'up': 'DF', 'down': 'FD'}
  sizes = {'D': config.embed_dim, 'F': config.hidden_dim}
  w = {
    name: normal(i, tuple(sizes[c] for c in letters))
    for i, (name, letters) in enumerate(names.items())
  }
  got = Mlp(config).apply({'params': {n: {'w': w[n]} for n in w}}, x)

  def mlp(gelu):
    gate, up, down = (np.asarray(w[n], np.float64) for n in names)
    y = np.asarray(x, np.float64)
    return (gelu(y @ gate) * (y @ up)) @ down

  tanh = lambda z: 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
  exact = lambda z: 0.5 * z * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
  toy.assert_close(got, mlp(tanh), 1e-5)
  assert np.abs(got - mlp(exact)).max() > 1e-4  # the two can be told apart


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_einsum_adds_the_adapter_that_it_is_given(dtype):
  x, w = normal(0, (B, T, D), dtype), normal(1, (D, F), dtype)
  a, b = normal(2, (D, R)), normal(3, (R, F))
  einsum = Einsum('BTD,DF->BTF', (D, F))
  plain = einsum.apply({'params': {'w': w}}, x)
  factors = {'lora_a': a, 'lora_b': b}
  got = einsum.apply({'params': {'w': w}, 'lora': factors}, x)
  assert got.dtype == dtype
  want = plain + adapter.apply('BTD,DF->BTF', x, a, b)
  np.testing.assert_array_equal(got, want)
  if dtype == jnp.float32:
    x, w, a, b = (np.asarray(y, np.float64) for y in (x, w, a, b))
    toy.assert_close(got, x @ w + x @ a @ b, 1e-5)


def test_a_float32_kernel_does_not_widen_bfloat16_activations():
  x = normal(0, (B, T, D), jnp.bfloat16)
  y = Einsum('BTD,DF->BTF', (D, F)).apply({'params': {'w': normal(1, (D, F))}}, x)
  assert y.dtype == jnp.bfloat16


def test_dropout_acts_on_the_adapters_input_only_and_only_with_a_key():
  """With A = B = 1 the update is the dropped-out input itself."""
  x, w, one = normal(0, (B, T, D)), normal(1, (D, D)), jnp.eye(D)
  variables = {'params': {'w': w}, 'lora': {'lora_a': one, 'lora_b': one}}
  einsum = Einsum('BTD,DF->BTF', (D, D), dropout=0.4)
  y = Einsum('BTD,DF->BTF', (D, D)).apply({'params': {'w': w}}, x)
  np.testing.assert_array_equal(einsum.apply(variables, x), y + x)

  @jax.jit
  def draw(seed):
    return einsum.apply(variables, x, rngs={'dropout': jax.random.key(seed)})

  ratio = np.asarray(draw(0) - y) / np.asarray(x)
  is_kept = ratio > 0.5
  np.testing.assert_allclose(ratio, is_kept / np.float32(0.6), atol=1e-3)
  assert 0.4 < is_kept.mean() < 0.8
  np.testing.assert_array_equal(draw(0), draw(0))
  assert np.any(draw(0) != draw(1))
