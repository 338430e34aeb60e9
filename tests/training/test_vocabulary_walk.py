"""What is walked through, and what is never computed; test_losses has the numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.training import losses, vocabulary_walk


def test_work_is_proportional_to_supervised_tokens(monkeypatch):
  """One chunk of 4 and one of 1 hold five positions; no other is visited."""
  B, T, D, V = 3, 7, 5, 53
  hidden, embedding = jnp.ones((B, T, D)), jnp.ones((V, D))
  statistics, seen = vocabulary_walk._statistics, []

  def spy(*args):
    seen.append(statistics(*args))
    return seen[-1]

  monkeypatch.setattr(vocabulary_walk, '_statistics', spy)
  weights = np.zeros((B, T), np.float32)
  weights[1, :5] = 1.0
  losses.token_cross_entropy(
    hidden, embedding, jnp.zeros((B, T), jnp.int32), jnp.array(weights), chunk=((4, 1), 11)
  )
  ((m, s, g),) = seen
  assert m.shape == (B * T + 1,)  # and room for a last chunk
  np.testing.assert_array_equal(s > 0, [True] * 5 + [False] * (B * T - 4))
  assert g is None  # evaluation makes no gradient


@pytest.mark.parametrize(
  ('supervised', 'chunks'),
  [
    (0, [0, 0]),
    (1, [0, 1]),
    (384, [0, 3]),
    (385, [1, 0]),
    (511, [1, 0]),
    (513, [1, 1]),
    (1020, [2, 0]),
  ],
)
def test_the_rest_of_the_positions_walks_in_smaller_chunks(supervised, chunks):
  """512 at a time, then 128, and never more positions than 128 would take."""
  walks = vocabulary_walk._walks((512, 128), jnp.int32(supervised))
  assert [int(walk.count) for walk in walks] == chunks
  assert int(walks[1].start) == 512 * chunks[0]


@pytest.mark.parametrize('sizes', [(5, 2), (8, 3, 1), (301, 76), (4,)])
def test_walks_take_every_position_once_and_little_more(sizes):
  """One walk starts where the one before ends, and no slice is moved back."""
  for supervised in range(2 * sizes[0] + 2):
    end = 0
    for walk in vocabulary_walk._walks(sizes, jnp.int32(supervised)):
      assert int(walk.start) == end
      end += int(walk.count) * walk.size
    assert supervised <= end <= max(0, supervised + sizes[-1] - 1)


def test_a_sum_scales_no_gradient():
  """Its cotangents are a constant 1; those of another function are looked at."""
  hidden, embedding, weights = jnp.ones((3, 7, 5)), jnp.ones((53, 5)), jnp.ones((3, 7))
  targets = jnp.zeros((3, 7), jnp.int32)

  def program(total):
    loss = lambda h, w: total(losses.token_cross_entropy(h, embedding, targets, w))
    return jax.jit(jax.grad(loss)).lower(hidden, weights).compile().as_text()

  assert 'is-finite' not in program(jnp.sum)
  assert 'is-finite' in program(lambda x: jnp.sum(jnp.sqrt(x)))
