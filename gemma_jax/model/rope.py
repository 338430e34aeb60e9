"""Rotary position embedding, split-half form (Su et al. 2021, 2104.09864)."""

import jax
import jax.numpy as jnp


def rotations(
  positions: jax.Array, head_dim: int, theta: float, scale: float = 1.0
) -> tuple[jax.Array, jax.Array]:
  """Sine and cosine of every position's angles.

  angle[i] = (position / scale) / theta ** (2 i / H), in float32 throughout.

  Args:
    positions: int32 [B, T].
    head_dim: H.
    theta: base of the wavelengths.
    scale: linear position scaling (1 is none).

  Returns:
    sin, cos, float32 [B, T, H / 2].
  """
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  timescale = scale * jnp.float32(theta) ** exponent  # [H / 2]
  positions = positions.astype(jnp.float32)
  angles = positions[:, :, None] / timescale[None, None]
  return jnp.sin(angles), jnp.cos(angles)


def apply(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """Rotates the pairs (x[i], x[i + H/2]); float32 inside, one cast at the end.

  Args:
    x: queries or keys [B, T, heads, H].
    sin: [B, T, H / 2].
    cos: [B, T, H / 2].

  Returns:
    [B, T, heads, H] in x's dtype.
  """
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  sin, cos = sin[:, :, None], cos[:, :, None]
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)
