"""The whole decoder: forms that must agree, and what a token may depend on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import pytree
from gemma_jax.model import layout
from gemma_jax.model.attention import init_cache
from gemma_jax.model.transformer import Transformer
from tests import toy

pytestmark = [
  pytest.mark.usefixtures('strict', 'quick_compile'),
  pytest.mark.filterwarnings('error'),
]

MODEL = Transformer(toy.FULL)


@pytest.fixture(scope='module')
def variables():
  return {'params': toy.base(), 'lora': toy.factors()}


@pytest.fixture(scope='module')
def apply(variables):
  """tokens [2, 11], segment_ids?, positions? → hidden [2, 11, D], compiled."""
  compiled = jax.jit(lambda *args: MODEL.apply(variables, *args))

  def call(tokens, *rest):
    return np.asarray(compiled(jnp.asarray(tokens, jnp.int32), *rest))

  return call


def random_tokens(*shape):
  return np.random.default_rng(5).integers(3, 53, shape, np.int32)


@functools.cache
def loss_and_gradients(scan_layers, remat):
  model = Transformer(toy.FULL, scan_layers=scan_layers, remat=remat)
  variables = {
    'params': toy.base(scan_layers=scan_layers),
    'lora': toy.factors(scan_layers=scan_layers),
  }
  loss = lambda v: toy.loss(model, v, toy.batch())
  value, grads = jax.jit(jax.value_and_grad(loss))(variables)
  if not scan_layers:
    grads = {k: layout.stack_layers(v) for k, v in grads.items()}
  return value, grads


@pytest.mark.parametrize(
  ('scan_layers', 'remat'), [(True, 'none'), (True, 'dots'), (False, 'full'), (False, 'none')]
)
def test_scan_and_remat_change_neither_loss_nor_gradients(scan_layers, remat):
  value, grads = loss_and_gradients(scan_layers, remat)
  expected_value, expected_grads = loss_and_gradients(True, 'full')
  toy.assert_close(value, expected_value, 1e-5)
  toy.assert_close(grads, expected_grads, 1e-5)


def test_every_parameter_reaches_the_loss():
  _, grads = loss_and_gradients(True, 'full')
  for name, grad in pytree.items(grads):
    assert np.abs(grad).max() > 1e-6, name


def test_what_stands_at_padding_changes_nothing(apply):
  tokens = random_tokens(2, 11)
  segment_ids = jnp.array([[1] * 11, [1] * 7 + [0] * 4])
  other = tokens.copy()
  other[1, 7:] = 0
  a, b = apply(tokens, segment_ids), apply(other, segment_ids)
  np.testing.assert_array_equal(a[1, :7], b[1, :7])
  np.testing.assert_array_equal(a[0], b[0])


def test_padded_on_either_side_equals_unpadded(apply):
  tokens = random_tokens(2, 11)
  want = apply(tokens)  # causal: its first 7 positions are the short row's
  short = tokens[1, :7]
  right = np.stack([tokens[0], np.pad(short, (0, 4))])
  left = np.stack([tokens[0], np.pad(short, (4, 0))])
  for padded, place in ((right, slice(0, 7)), (left, slice(4, 11))):
    got = apply(padded, jnp.asarray(padded > 0, jnp.int32))
    toy.assert_close(got[0], want[0], 1e-5)
    toy.assert_close(got[1, place], want[1, :7], 1e-5)


def test_a_row_of_padding_alone_is_finite(apply):
  got = apply(np.zeros((2, 11)), jnp.zeros((2, 11), jnp.int32))
  assert np.isfinite(got).all()


def test_packed_documents_equal_documents_in_rows_of_their_own(apply):
  tokens = random_tokens(2, 11)
  packed = np.stack([np.r_[tokens[0, :4], tokens[1, :7]], tokens[1]])
  segment_ids = jnp.array([[1] * 4 + [2] * 7, [1] * 11])
  positions = jnp.array([[*range(4), *range(7)], [*range(11)]])
  got, want = apply(packed, segment_ids, positions), apply(tokens)
  toy.assert_close(got[0, :4], want[0, :4], 1e-5)
  toy.assert_close(got[0, 4:], want[1, :7], 1e-5)


def test_tokens_depend_on_earlier_ones_only(apply):
  tokens = random_tokens(2, 11)
  other = tokens.copy()
  other[0, 6] += 1
  changed = np.abs(apply(tokens) - apply(other)).max(-1)[0] > 1e-6
  np.testing.assert_array_equal(changed, np.arange(11) >= 6)


@pytest.mark.parametrize(('is_local', 'reach'), [(True, 4), (False, 11)], ids=['local', 'global'])
@pytest.mark.parametrize('scan_layers', [True, False])
def test_a_local_layer_sees_its_window_and_a_global_one_all(is_local, reach, scan_layers):
  config = dataclasses.replace(toy.FULL, num_layers=1, layer_is_local=(is_local,))
  model = Transformer(config, scan_layers=scan_layers)
  params = toy.base(config, scan_layers)
  tokens = random_tokens(1, 11)
  other = tokens.copy()
  other[0, 0] += 1
  apply = jax.jit(lambda x: model.apply({'params': params}, x))
  difference = np.abs(apply(tokens) - apply(other)).max(-1)[0]
  np.testing.assert_array_equal(difference > 1e-7, np.arange(11) < reach)


def test_cached_decoding_equals_the_full_forward_pass(variables, apply):
  """Prefill of left-padded rows, then a token at a time, past the window."""
  tokens = random_tokens(2, 11)
  lengths, prefill = np.array([6, 4]), 6
  rows = np.zeros((2, prefill), np.int32)
  for i, n in enumerate(lengths):
    rows[i, prefill - n :] = tokens[i, :n]
  cache = init_cache(toy.FULL, 2, 13, jnp.float32)
  decode = jax.jit(lambda *args: MODEL.apply(variables, *args))
  segment_ids = jnp.asarray(rows > 0, jnp.int32)
  hidden, cache = decode(jnp.asarray(rows), segment_ids, None, cache)
  whole = apply(tokens)
  for i, n in enumerate(lengths):
    toy.assert_close(hidden[i, prefill - n :], whole[i, :n], 1e-5)
  for step in range(5):
    at = lengths + step
    new = jnp.asarray(tokens[[0, 1], at][:, None])
    # Positions are counted on from the cache's tokens.
    hidden, cache = decode(new, None, None, cache)
    toy.assert_close(hidden[:, 0], whole[[0, 1], at], 1e-5)
  assert cache.index == prefill + 5


def test_layers_that_are_all_global_need_no_window_to_decode():
  config = dataclasses.replace(toy.FULL, layer_is_local=(False,) * 3, window_size=None)
  model, params, tokens = Transformer(config), toy.base(config), random_tokens(1, 4)
  cached = lambda x, cache: model.apply({'params': params}, x, cache=cache)[0]
  hidden = jax.jit(cached)(tokens, init_cache(config, 1, 4, jnp.float32))
  toy.assert_close(hidden, model.apply({'params': params}, tokens), 1e-5)


def test_a_bfloat16_base_under_float32_activations_is_only_cast():
  tokens = jnp.asarray(random_tokens(2, 11))
  params = toy.base(dtype=jnp.bfloat16)
  cast = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  apply = jax.jit(lambda params: MODEL.apply({'params': params}, tokens))
  toy.assert_equal(apply(params), apply(cast))


def test_bfloat16_activations_give_bfloat16_states_and_float32_logits():
  model = Transformer(toy.FULL, dtype=jnp.bfloat16)
  params = {'params': toy.base()}
  tokens = jnp.asarray(random_tokens(2, 11))
  hidden = jax.jit(model.apply)(params, tokens)
  logits = model.apply(params, hidden, method='logits')
  assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
  # Three layers of 8-bit mantissas: a correlation, not a tolerance.
  want = np.asarray(jax.jit(MODEL.apply)(params, tokens)).ravel()
  got = np.asarray(hidden, np.float32).ravel()
  assert np.corrcoef(got, want)[0, 1] > 0.99


def test_logits_are_capped():
  params = {'params': toy.base()}
  hidden = 100 * jnp.ones((2, 3, toy.FULL.embed_dim))
  logits = MODEL.apply(params, hidden, method='logits')
  assert logits.shape == (2, 3, toy.FULL.vocab_size)
  table = np.asarray(params['params']['embedder']['input_embedding'])
  want = 3.0 * np.tanh(100 * table.sum(1) / 3.0)
  toy.assert_close(logits, np.broadcast_to(want, logits.shape), 1e-5)
