"""Rotary embedding against float64, and the properties it exists for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.model import rope

pytestmark = [
  pytest.mark.usefixtures('strict', 'quick_compile'),
  pytest.mark.filterwarnings('error'),
]

B, T, HEADS, H = 2, 7, 3, 22


def reference(positions, theta, scale):
  """Angles of a position in float64."""
  i = np.arange(H // 2)
  return positions[..., None] / scale / theta ** (2 * i / H)


@pytest.mark.parametrize('theta', [1e4, 1e6])
@pytest.mark.parametrize('scale', [1.0, 8.0])
def test_rotations_equal_float64_at_the_last_positions(theta, scale):
  """In bfloat16 position 32767 would be off by up to 64 radians."""
  positions = np.array([[0, 1, 511, 4095, 8191, 32766, 32767]])
  sin, cos = rope.rotations(jnp.asarray(positions, jnp.int32), H, theta, scale)
  angles = reference(positions, theta, scale)
  assert sin.dtype == cos.dtype == jnp.float32
  # An angle of 32767 has a float32 spacing of 0.002; its error is a few.
  np.testing.assert_allclose(sin, np.sin(angles), atol=6e-3)
  np.testing.assert_allclose(cos, np.cos(angles), atol=6e-3)
  np.testing.assert_allclose(sin[:, :3], np.sin(angles)[:, :3], atol=1e-4)


def test_rotates_the_halves_against_each_other():
  """Split-half, not interleaved: x[i] pairs with x[i + H / 2]."""
  x = jax.random.normal(jax.random.key(0), (B, T, HEADS, H))
  positions = jnp.broadcast_to(jnp.arange(T)[None] + 3, (B, T))
  got = rope.apply(x, *rope.rotations(positions, H, 100.0))
  angles = reference(np.asarray(positions), 100.0, 1.0)[:, :, None]
  pairs = np.asarray(x, np.float64)[..., : H // 2] + 1j * np.asarray(x, np.float64)[..., H // 2 :]
  turned = pairs * np.exp(1j * angles)
  want = np.concatenate([turned.real, turned.imag], axis=-1)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_scores_depend_on_the_distance_alone():
  q, k = jax.random.normal(jax.random.key(1), (2, 1, 1, HEADS, H))

  def score(q_position, k_position):
    turn = lambda x, position: rope.apply(x, *rope.rotations(jnp.array([[position]]), H, 1e4))
    return jnp.sum(turn(q, q_position) * turn(k, k_position))

  np.testing.assert_allclose(score(17, 6), score(111, 100), rtol=1e-4)
  assert abs(score(17, 6) - score(17, 7)) > 1e-2


def test_bfloat16_is_rotated_in_float32_and_cast_last():
  x = jax.random.normal(jax.random.key(2), (B, T, HEADS, H), jnp.bfloat16)
  rotation = rope.rotations(jnp.full((B, T), 1001), H, 1e4)
  got = rope.apply(x, *rotation)
  want = rope.apply(x.astype(jnp.float32), *rotation).astype(jnp.bfloat16)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, want)


def test_linear_scaling_divides_positions():
  at = lambda position, scale: rope.rotations(jnp.array([[position]]), H, 1e4, scale)
  for got, want in zip(at(88, 8.0), at(11, 1.0), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-6)
