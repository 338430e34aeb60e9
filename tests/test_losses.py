"""The chunked loss against the plain one, and what it never computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import losses

B, T, D, V = 3, 7, 5, 53


pytestmark = [
  pytest.mark.usefixtures('strict'),
  pytest.mark.filterwarnings('error'),
]


@pytest.fixture(scope='module')
def case():
  keys = jax.random.split(jax.random.key(0), 4)
  return (
    jax.random.normal(keys[0], (B, T, D)),
    jax.random.normal(keys[1], (V, D)),
    jax.random.randint(keys[2], (B, T), 0, V - 6),
    jax.random.bernoulli(keys[3], 0.5, (B, T)).astype(jnp.float32),
  )


def plain(hidden, embedding, targets, weights, softcap=None, num_pieces=None):
  """Full logits and log_softmax, per position."""
  logits = jnp.einsum('BTD,VD->BTV', hidden, embedding)
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  if num_pieces is not None:
    logits = logits[..., :num_pieces]
  log_probs = jax.nn.log_softmax(logits)
  picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
  return -weights * picked


OPTIONS = [
  {},
  {'softcap': 3.0},
  {'num_pieces': V - 6},
  {'softcap': 3.0, 'num_pieces': V - 6},
]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
@pytest.mark.parametrize('chunk_tokens', [2, 4, 64])
def test_equals_the_plain_loss_and_both_gradients(case, options, chunk_tokens):
  hidden, embedding, targets, weights = case

  def chunked_sum(h, e):
    return 0.3 * losses.linear_cross_entropy(
      h, e, targets, weights, chunk_tokens=chunk_tokens, **options
    )

  def plain_sum(h, e):
    return 0.3 * plain(h, e, targets, weights, **options).sum()

  value, grads = jax.value_and_grad(chunked_sum, (0, 1))(hidden, embedding)
  expected, expected_grads = jax.value_and_grad(plain_sum, (0, 1))(
    hidden, embedding
  )
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for got, want in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_token_losses_equal_the_plain_ones(case, options):
  got = losses.token_cross_entropy(*case, chunk_tokens=4, **options)
  np.testing.assert_allclose(got, plain(*case, **options), atol=1e-5)


def test_bfloat16_states_keep_float32_logits_and_loss(case):
  """Logits of about 30 in bfloat16 would be off by a tenth."""
  hidden, embedding, targets, weights = case
  hidden, embedding = (
    x.astype(jnp.bfloat16) for x in (10 * hidden, 3 * embedding)
  )
  loss = lambda h, e: losses.linear_cross_entropy(h, e, targets, weights)
  value, grads = jax.value_and_grad(loss, (0, 1))(hidden, embedding)
  wide = (x.astype(jnp.float32) for x in (hidden, embedding))
  expected, expected_grads = jax.value_and_grad(loss, (0, 1))(*wide)
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for got, want in zip(grads, expected_grads, strict=True):
    assert got.dtype == jnp.bfloat16
    largest = float(jnp.abs(want).max())
    np.testing.assert_allclose(
      got.astype(jnp.float32), want, atol=0.01 * largest
    )


def test_a_frozen_embedding_gets_no_gradient_buffer(case):
  hidden, embedding, targets, weights = case
  loss = lambda h, e: losses.linear_cross_entropy(h, e, targets, weights)
  frozen = jax.make_jaxpr(jax.grad(loss, 0))(hidden, embedding)
  trained = jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, embedding)
  buffer = f'f32[{V},{D}] = '
  count = lambda jaxpr: str(jaxpr).count('->VD') + str(jaxpr).count(buffer)
  assert count(frozen) < count(trained)
  assert count(frozen) == 0


def test_nothing_supervised_gives_zero_and_finite_gradients(case):
  hidden, embedding, targets, _ = case
  loss = lambda h: losses.linear_cross_entropy(
    h, embedding, targets, jnp.zeros((B, T))
  )
  value, grad = jax.value_and_grad(loss)(hidden)
  assert value == 0
  np.testing.assert_array_equal(grad, np.zeros((B, T, D)))


def test_ignores_what_stands_at_unsupervised_positions(case):
  hidden, embedding, targets, weights = case
  noise = jnp.where(weights[..., None] == 0, jnp.nan, 0.0)
  other = jnp.where(weights == 0, 1, targets)
  a = losses.linear_cross_entropy(hidden, embedding, targets, weights)
  b = losses.linear_cross_entropy(hidden + noise, embedding, other, weights)
  assert a == b


def test_work_is_proportional_to_supervised_tokens(case):
  """The loop's trip count, not B T / C, decides the time: count the visits."""
  hidden, embedding, targets, _ = case
  visits = lambda weights: losses._over_chunks(
      losses._Options(None, None, 4), hidden, embedding, targets, weights,
      lambda n, index, chunk: n + 1, jnp.int32(0),
  )  # fmt: skip
  weights = np.zeros((B, T), np.float32)
  weights[1, :5] = 1.0
  assert visits(jnp.array(weights)) == 2  # ceil(5 / 4), of ceil(21 / 4) = 6


def test_vmap_over_hidden_states_equals_a_loop(case):
  """Several adapters share targets and weights (ganged training)."""
  hidden, embedding, targets, weights = case
  many = jnp.stack([hidden, 2 * hidden])
  loss = lambda h: losses.linear_cross_entropy(h, embedding, targets, weights)
  values, grads = jax.vmap(jax.value_and_grad(loss))(many)
  for i in range(2):
    value, grad = jax.value_and_grad(loss)(many[i])
    np.testing.assert_allclose(values[i], value, rtol=1e-6)
    np.testing.assert_allclose(grads[i], grad, atol=1e-6)
