"""`plain_gradients`: the same numbers, open to `jax.jvp` and second derivatives."""

import dataclasses

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import pytest

from gemma_jax.config.train import LoraConfig, MeshConfig, OptimizerConfig
from gemma_jax.model import kernels
from gemma_jax.model.transformer import Transformer
from gemma_jax.training import optimizer, sharding
from gemma_jax.training import state as state_lib
from gemma_jax.training import step as step_lib
from gemma_jax.training.model import Model
from tests import toy

pytestmark = [
  pytest.mark.usefixtures('quick_compile'),
  pytest.mark.filterwarnings('error'),
]

# Every switch on, and 160 numbers in an adapter of rank 1.
CONFIG = dataclasses.replace(
  toy.FULL,
  vocab_size=11,
  embed_dim=5,
  hidden_dim=7,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  layer_is_local=(True, False),
)
RANK_1 = LoraConfig(rank=1, targets='all')


def splash_attend():
  """A kernel whose gradient is custom, too."""
  return kernels.choose(
    'splash', CONFIG, 'float32', sharding.make_mesh(MeshConfig(fsdp=1)), ('fsdp',), 'tensor'
  )


class Problem:
  """The tiny model's loss as a function of its adapter, a vector."""

  def __init__(self, plain_gradients: bool, attend=None):
    options = {} if attend is None else {'attend': attend}
    self.model = Model(Transformer(CONFIG, plain_gradients=plain_gradients, **options))
    self.base = toy.base(CONFIG)
    self.batch = toy.batch(length=7, vocab_size=CONFIG.vocab_size)
    self.factors, self.unravel = ravel_pytree(toy.factors(CONFIG, RANK_1))

  def loss(self, factors: jax.Array) -> jax.Array:
    variables = {'params': self.base, 'lora': self.unravel(factors)}
    return toy.loss(self.model.transformer, variables, self.batch)


@pytest.fixture(scope='module')
def plain():
  return Problem(plain_gradients=True, attend=splash_attend())


@pytest.fixture(scope='module')
def custom():
  return Problem(plain_gradients=False)


@pytest.fixture(scope='module')
def custom_gradient(custom):
  """factors → (loss, gradient)."""
  return jax.jit(jax.value_and_grad(custom.loss))


@pytest.fixture(scope='module')
def vector(plain):
  """A direction in the space of the factors, of length 1."""
  x = jax.random.normal(jax.random.key(0), plain.factors.shape)
  return x / jnp.linalg.norm(x)


@pytest.fixture(scope='module')
def forward(plain, vector):
  """((loss, gradient), (slope along the vector, Hessian times it))."""
  function = lambda x, v: jax.jvp(jax.value_and_grad(plain.loss), (x,), (v,))
  return jax.jit(function)(plain.factors, vector)


@pytest.fixture(scope='module')
def hessian(plain):
  return jax.jit(jax.hessian(plain.loss))(plain.factors)


def test_values_and_slopes_are_those_of_the_custom_gradient(
  plain, custom_gradient, vector, forward
):
  (loss, gradient), (slope, _) = forward
  want_loss, want = custom_gradient(plain.factors)
  toy.assert_close((loss, gradient, slope), (want_loss, want, want @ vector), 1e-5)


def test_a_hessian_vector_product_is_the_hessian_times_the_vector(vector, forward, hessian):
  assert hessian.shape == (160, 160)
  largest = float(jnp.abs(hessian).max())
  toy.assert_close(hessian / largest, hessian.T / largest, 1e-5)
  toy.assert_close(forward[1][1] / largest, hessian @ vector / largest, 1e-5)


def test_a_hessian_vector_product_is_the_slope_of_the_custom_gradient(
  plain, custom_gradient, vector, forward
):
  """Central differences in float32: h^2 of the third derivative, and 1e-7 / h."""
  h = 1e-2
  ahead, behind = (custom_gradient(plain.factors + sign * h * vector)[1] for sign in (1, -1))
  got = forward[1][1]
  largest = float(jnp.abs(got).max())
  toy.assert_close(got / largest, (ahead - behind) / (2 * h) / largest, 1e-3)


def test_the_custom_gradient_has_no_forward_mode(custom, vector):
  """Were it to work, nothing of this would be needed."""
  with pytest.raises(TypeError, match='custom_vjp'):
    jax.jvp(custom.loss, (custom.factors,), (vector,))


def test_the_base_has_the_same_gradients():
  """The tied embedding's, too, which takes a second walk."""
  variables, batch = {'params': toy.base(), 'lora': toy.factors()}, toy.batch()

  def run(plain_gradients):
    model = Transformer(toy.FULL, plain_gradients=plain_gradients)
    return jax.jit(jax.value_and_grad(lambda v: toy.loss(model, v, batch)))(variables)

  toy.assert_close(run(True), run(False), 1e-5)


def test_both_steps_follow_the_model(plain, vector, forward):
  """The training step's own gradient is differentiated: d |g| = g H v / |g|."""
  tx = optimizer.make_optimizer(OptimizerConfig(), 100, ('lora/',))
  step = step_lib.make_train_step(plain.model, step_lib.token_loss, lambda _: (tx, None))
  eval_step = step_lib.make_eval_step(plain.model)
  hyper = step_lib.Hyperparameters(jnp.float32(1))

  def metrics(factors):
    variables = {'params': plain.base, 'lora': plain.unravel(factors)}
    trainable, frozen = state_lib.split(variables, ('lora/',))
    _, metrics = step(state_lib.init_state(trainable, tx), hyper, frozen, plain.batch)
    losses = eval_step(trainable, hyper, frozen, plain.batch)
    mean = jnp.sum(losses) / jnp.sum(plain.batch['weights'])
    return metrics['loss'], metrics['grad_norm'], mean

  got = jax.jit(lambda x, v: jax.jvp(metrics, (x,), (v,)))(plain.factors, vector)
  (loss, gradient), (slope, product) = forward
  norm = jnp.linalg.norm(gradient)
  toy.assert_close(got, ((loss, norm, loss), (slope, gradient @ product / norm, slope)), 1e-5)
