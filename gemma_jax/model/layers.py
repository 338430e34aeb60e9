"""Einsum with an optional adapter, RMSNorm and the reversible embedding.

Kernels and embedding come from the collection `params`, or, for decoding, from
`rows` (`gemma_jax.sampling.weights`).
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

from gemma_jax.model import adapter, rows


class Einsum(nn.Module):
  """A projection y = x W, plus x A B if the collection `lora` has factors.

  A gain, one number per output, multiplies the sum (DoRA, `Lora.variables`).

  Attributes:
    equation: e.g. 'BTD,NDH->BTNH'.
    shape: of the kernel, e.g. (N, D, H).
    dropout: rate on the adapter's input; active when a `dropout` key is given.
    plain_gradients: as in `adapter.apply`.
  """

  equation: str
  shape: tuple[int, ...]
  dropout: float = 0.0
  plain_gradients: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    if self.has_variable('rows', 'w'):
      y = rows.product(self.equation, x, self.get_variable('rows', 'w'))
    else:
      w = self.param('w', nn.initializers.normal(0.02), self.shape)
      y = jnp.einsum(self.equation, x, w.astype(x.dtype))
    if self.has_variable('lora', 'lora_a'):
      if self.dropout > 0:
        idle = not self.has_rng('dropout')
        x = nn.Dropout(self.dropout)(x, deterministic=idle)
      y = y + adapter.apply(
        self.equation,
        x,
        self.get_variable('lora', 'lora_a'),
        self.get_variable('lora', 'lora_b'),
        self.plain_gradients,
      )
      if self.has_variable('lora', 'lora_magnitude'):
        raise ValueError('lora: got magnitudes, expected gains: use the result of Lora.variables.')
      if self.has_variable('lora', 'lora_gain'):
        gain = self.get_variable('lora', 'lora_gain')  # y has B, T before
        gain = jnp.expand_dims(gain, (0, 1))
        y = (y.astype(gain.dtype) * gain).astype(y.dtype)
    return y


class RMSNorm(nn.Module):
  """x / rms(x) * (1 + scale), float32 inside, one cast at the end."""

  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param('scale', nn.initializers.zeros, (x.shape[-1],))
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    scale = jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))
    return (y * (1.0 + scale)).astype(x.dtype)


class Embedder(nn.Module):
  """The reversible embedding: rows in, logits out, one table [V, D]."""

  vocab_size: int
  embed_dim: int
  dtype: jax.typing.DTypeLike

  def setup(self):
    if self.has_variable('rows', 'input_embedding'):
      self.rows = self.get_variable('rows', 'input_embedding')
      return
    self.rows = rows.Rows(
      self.param('input_embedding', nn.initializers.normal(0.02), (self.vocab_size, self.embed_dim))
    )

  def encode(self, tokens: jax.Array) -> jax.Array:
    """tokens [B, T] → [B, T, D], times sqrt(D) rounded to the dtype."""
    x = rows.take(self.rows, tokens, self.dtype)
    return x * jnp.sqrt(jnp.float32(self.embed_dim)).astype(self.dtype)

  def decode(self, x: jax.Array) -> jax.Array:
    """hidden [B, T, D] → logits float32 [B, T, V], before the final cap."""
    return rows.product('BTD,VD->BTV', x, self.rows, jnp.float32)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
  """cap * tanh(x / cap); None leaves x unchanged (Gemma 2 report, eq. 1)."""
  return x if cap is None else cap * jnp.tanh(x / cap)
