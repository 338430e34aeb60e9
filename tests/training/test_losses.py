"""The walk against the plain form, that against optax, and what costs nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma_jax.config.train import MeshConfig
from gemma_jax.training import losses
from gemma_jax.training import sharding as sharding_lib
from tests import toy

B, T, D, V = 3, 7, 5, 53


pytestmark = [
  pytest.mark.usefixtures('strict', 'quick_compile'),
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


plain = functools.partial(losses.token_cross_entropy, plain_gradients=True)


def loss_sum(*args, **options):
  return jnp.sum(losses.token_cross_entropy(*args, **options))


def curved(losses):
  """A scalar with another cotangent at each position of [..., B, T], some negative."""
  coefficients = jnp.cos(jnp.arange(losses.size, dtype=jnp.float32)).reshape(losses.shape)
  pair = jnp.sum(losses[..., 0, :]) - jnp.sum(losses[..., 1, :])
  return jnp.sum(jnp.sin(losses) * coefficients) + jax.nn.softplus(0.3 * pair)


OPTIONS = [{}, {'softcap': 3.0}, {'num_pieces': V - 6}, {'softcap': 3.0, 'num_pieces': V - 6}]


@pytest.mark.parametrize(
  ('options', 'chunk'),
  [
    *((options, ((4,), 11)) for options in OPTIONS),
    (OPTIONS[-1], ((2,), 53)),
    (OPTIONS[-1], ((64,), 64)),
    (OPTIONS[-1], ((5, 2), 11)),
    (OPTIONS[-1], ((8, 3, 1), 11)),
  ],
  ids=str,
)
def test_equals_the_plain_loss_and_both_gradients(case, options, chunk):
  """Of a sum, and of any other function of the losses."""
  hidden, embedding, targets, weights = case
  weights = weights * 0.7

  def run(losses, **options):
    def of(function):
      loss = lambda h, e: function(losses(h, e, targets, weights, **options))
      return jax.value_and_grad(loss, (0, 1))

    return jax.jit(lambda *xs: (of(jnp.sum)(*xs), of(curved)(*xs)))(hidden, embedding)

  got, expected = run(losses.token_cross_entropy, chunk=chunk, **options), run(plain, **options)
  for (value, grads), (want, want_grads) in zip(got, expected, strict=True):
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for grad, want_grad in zip(grads, want_grads, strict=True):
      np.testing.assert_allclose(grad, want_grad, atol=1e-5)


@pytest.mark.parametrize('each', [jax.vmap, lambda f: functools.partial(jax.lax.map, f)])
def test_mapped_members_have_cotangents_of_their_own(case, each):
  """Hidden states and embeddings of several models, and one loss of all of them."""
  hidden, embedding, targets, weights = case
  many = jnp.stack([hidden, 2 * hidden]), jnp.stack([embedding, -embedding])

  def run(losses):
    return jax.jit(
      jax.value_and_grad(lambda xs: curved(each(lambda x: losses(*x, targets, weights))(xs)))
    )(many)

  got = run(functools.partial(losses.token_cross_entropy, chunk=((4, 2), 11)))
  toy.assert_close(got, run(plain), 1e-5)


@pytest.mark.parametrize('losses', [losses.token_cross_entropy, plain], ids=['walk', 'plain'])
def test_without_a_weight_there_is_no_gradient_whatever_the_cotangent(case, losses):
  """The square root of 0 has an infinite slope; NaN stands where nothing counts."""
  hidden, embedding, targets, weights = case
  ignored = weights[..., None] == 0
  noise = jnp.where(ignored, jnp.nan, 0.0)
  loss = lambda h, e: jnp.sum(jnp.sqrt(losses(h, e, targets, weights)))
  d_hidden, d_embedding = jax.jit(jax.grad(loss, (0, 1)))(hidden + noise, embedding)
  assert jnp.isfinite(d_hidden).all() and jnp.isfinite(d_embedding).all()
  assert not jnp.where(ignored, d_hidden, 0.0).any()


def test_losses_that_count_as_constants_have_no_gradient(case):
  hidden, embedding, targets, weights = case

  @jax.jit
  def loss(h, e):
    return h[0, 0, 0] + jnp.sum(
      jax.lax.stop_gradient(losses.token_cross_entropy(h, e, targets, weights))
    )

  d_hidden, d_embedding = jax.grad(loss, (0, 1))(hidden, embedding)
  assert d_hidden[0, 0, 0] == jnp.sum(jnp.abs(d_hidden)) == 1.0
  assert not d_embedding.any()


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_the_plain_form_equals_optax(case, options):
  hidden, embedding, targets, weights = case
  logits = jnp.einsum('BTD,VD->BTV', hidden, embedding)
  if 'softcap' in options:
    logits = options['softcap'] * jnp.tanh(logits / options['softcap'])
  logits = logits[..., : options.get('num_pieces')]
  want = weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  np.testing.assert_allclose(plain(*case, **options), want, atol=1e-5)


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_token_losses_equal_the_plain_ones(case, options):
  got = losses.token_cross_entropy(*case, chunk=((4,), 7), **options)
  np.testing.assert_allclose(got, plain(*case, **options), atol=1e-5)


def test_bfloat16_states_keep_float32_logits_and_loss(case):
  """Logits of about 30 in bfloat16 would be off by a tenth."""
  hidden, embedding, targets, weights = case
  hidden, embedding = (x.astype(jnp.bfloat16) for x in (10 * hidden, 3 * embedding))
  loss = lambda h, e: loss_sum(h, e, targets, weights)
  value, grads = jax.value_and_grad(loss, (0, 1))(hidden, embedding)
  wide = (x.astype(jnp.float32) for x in (hidden, embedding))
  expected, expected_grads = jax.value_and_grad(loss, (0, 1))(*wide)
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for got, want in zip(grads, expected_grads, strict=True):
    assert got.dtype == jnp.bfloat16
    largest = float(jnp.abs(want).max())
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.01 * largest)


def test_a_frozen_embedding_gets_no_gradient_buffer(case):
  hidden, embedding, targets, weights = case
  loss = lambda h, e: loss_sum(h, e, targets, weights, chunk=((4,), 11))
  frozen = jax.make_jaxpr(jax.grad(loss, 0))(hidden, embedding)
  trained = jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, embedding)
  buffer = f'f32[{V},{D}] = '
  count = lambda jaxpr: str(jaxpr).count('->VD') + str(jaxpr).count(buffer)
  assert count(frozen) < count(trained)
  assert count(frozen) == 0


def test_nothing_supervised_gives_zero_and_finite_gradients(case):
  hidden, embedding, targets, _ = case
  loss = lambda h: loss_sum(h, embedding, targets, jnp.zeros((B, T)))
  with jax.debug_nans(True):  # nor is there one that is dropped later
    value, grad = jax.value_and_grad(loss)(hidden)
  assert value == 0
  np.testing.assert_array_equal(grad, np.zeros((B, T, D)))


def test_ignores_what_stands_at_unsupervised_positions(case):
  hidden, embedding, targets, weights = case
  noise = jnp.where(weights[..., None] == 0, jnp.nan, 0.0)
  other = jnp.where(weights == 0, 1, targets)
  a = loss_sum(hidden, embedding, targets, weights)
  b = loss_sum(hidden + noise, embedding, other, weights)
  assert a == b


def test_scan_and_remat_change_nothing(case):
  """Accumulation scans over parts; gradients pass through both."""
  hidden, embedding, targets, weights = case
  loss = jax.checkpoint(
    lambda h, *xs: loss_sum(h[None], embedding, *(x[None] for x in xs), chunk=((4,), 11))
  )

  def total(h):
    step = lambda sum_, xs: (sum_ + loss(*xs), None)
    return jax.lax.scan(step, jnp.float32(0), (h, targets, weights))[0]

  value, grad = jax.jit(jax.value_and_grad(total))(hidden)
  expected, want = jax.value_and_grad(lambda h: plain(h, embedding, targets, weights).sum())(hidden)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(grad, want, atol=1e-5)


@pytest.mark.parametrize('sizes', [(2, 2, 2), (8, 1, 1), (1, 1, 8)])
def test_a_mesh_changes_neither_loss_nor_gradients(sizes):
  """Devices with many, few and no supervised positions, K hidden states."""
  K, B, V = 2, 8, 56
  mesh = sharding_lib.make_mesh(MeshConfig(*sizes))
  rng = np.random.default_rng(0)
  hidden = rng.standard_normal((K, B, T, D), np.float32)
  embedding = rng.standard_normal((V, D), np.float32)
  targets = rng.integers(0, V - 9, (B, T), np.int32)
  weights = (np.arange(T) < np.array([7, 0, 0, 1, 5, 7, 2, 0])[:, None]) * 0.5
  weights = weights.astype(np.float32)
  options = {'softcap': 3.0, 'num_pieces': V - 9}

  def run(losses):
    """Gradients of a sum, as a training step takes them; then of any function."""

    def each(h, e):
      return losses(h, e, targets, weights, **options)

    @jax.jit
    def values(hidden, embedding):
      summed = jax.value_and_grad(lambda h, e: jnp.sum(each(h, e)), (0, 1))
      of_all = jax.value_and_grad(lambda h, e: curved(jax.vmap(each, (0, None))(h, e)), (0, 1))
      return (
        each(hidden[0], embedding),
        jax.vmap(summed, (0, None))(hidden, embedding),
        of_all(hidden, embedding),
      )

    return values(hidden, embedding)

  sharded = functools.partial(
    losses.token_cross_entropy, sharding=sharding_lib.batch_sharding(mesh), chunk=((4, 2), 5)
  )
  toy.assert_close(run(sharded), run(plain), 1e-5)


def test_a_target_that_is_no_token_has_no_finite_loss(case):
  hidden, embedding, targets, weights = case
  b, t = map(int, jnp.argwhere(weights)[0])
  targets = targets.at[b, t].set(V - 2)
  for form in (functools.partial(losses.token_cross_entropy, chunk=((4,), 11)), plain):
    got = form(hidden, embedding, targets, weights, num_pieces=V - 6)
    assert jnp.isinf(got[b, t])
    assert jnp.isfinite(got.at[b, t].set(0.0)).all()
