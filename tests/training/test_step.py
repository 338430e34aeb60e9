"""What a training step may change, and what its result may depend on."""

import dataclasses
import functools
import math

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma_jax import pytree
from gemma_jax.config.train import LoraConfig, OptimizerConfig
from gemma_jax.model import layout
from gemma_jax.model.transformer import Transformer
from gemma_jax.training import optimizer, vocabulary_walk
from gemma_jax.training import state as state_lib
from gemma_jax.training import step as step_lib
from gemma_jax.training.model import Model
from gemma_jax.training.step import Hyperparameters
from tests import toy

pytestmark = pytest.mark.usefixtures('quick_compile')

HYPER = Hyperparameters(jnp.float32(1))


def variables(dtype=jnp.float32, scan_layers=True):
  return {
    'params': toy.base(scan_layers=scan_layers, dtype=dtype),
    'lora': toy.factors(scan_layers=scan_layers),
  }


@functools.cache
def evaluate():
  """(variables, batch) → losses [B, T], factors taken as they are."""
  eval_step = jax.jit(step_lib.make_eval_step(Model(Transformer(toy.FULL))))
  return lambda variables, batch, scale=1.0: eval_step(*whole(variables, scale), batch)


def whole(variables, scale=1.0):
  """What a step takes before its batch, all of it in the first argument."""
  holes = jax.tree.map(lambda _: optax.MaskedNode(), variables)
  return variables, Hyperparameters(jnp.float32(scale)), holes


@pytest.fixture(scope='module')
def run():
  """Five steps of the adapter over a bfloat16 base, with weight decay."""
  return toy.train(variables(jnp.bfloat16), [toy.batch(rows=6)] * 5)


def test_the_base_is_bit_equal_after_steps_with_weight_decay(run):
  toy.assert_equal(run.variables['params'], toy.base(dtype=jnp.bfloat16))


def test_every_factor_was_trained_in_float32(run):
  before = dict(pytree.items(variables()['lora']))
  for name, x in pytree.items(run.variables['lora']):
    assert x.dtype == jnp.float32
    assert np.all(np.asarray(x) != before[name]), name


def test_moments_are_float32_and_of_the_trainable_leaves_alone(run):
  moments = toy.optimizer_leaves(run.state)
  trained = dict(pytree.items(run.variables['lora']))
  assert {x.dtype for x in moments.values()} == {jnp.dtype('float32')}
  assert sorted(x.shape for x in moments.values()) == sorted(
    2 * [x.shape for x in trained.values()]
  )
  assert all('lora' in name for name in moments)


def test_one_trace_for_all_steps(run):
  assert run.traces == 1
  assert run.state.step == 5


def test_it_learns(run):
  assert run.losses[-1] < 0.9 * run.losses[0]
  assert run.losses == sorted(run.losses, reverse=True)


def test_metrics(run):
  batch = toy.batch(rows=6)
  start = variables(jnp.bfloat16)
  losses = evaluate()(start, batch, toy.ALL_TARGETS.scale)
  tokens = batch['weights'].sum()
  toy.assert_close(run.losses[0], losses.sum() / tokens, 1e-5)
  assert run.metrics[0]['weight'] == tokens
  assert all(m['learning_rate'] == np.float32(0.01) for m in run.metrics)


def test_lora_and_one_kernel_of_one_layer():
  """Unrolled, so that a mask can name the layer: only that kernel moves."""
  before = variables(jnp.bfloat16, scan_layers=False)
  run = toy.train(
    before, [toy.batch()] * 3, trainable=('lora/', 'params/layer_1/attn/v'), scan_layers=False
  )
  kernel = run.variables['params']['layer_1']['attn']['v']['w']
  assert kernel.dtype == jnp.float32
  assert np.all(kernel != before['params']['layer_1']['attn']['v']['w'])
  after = {**run.variables['params']}
  after['layer_1'] = {
    **after['layer_1'],
    'attn': {**after['layer_1']['attn'], 'v': before['params']['layer_1']['attn']['v']},
  }
  toy.assert_equal(after, before['params'])
  moments = toy.optimizer_leaves(run.state)
  of_base = [name for name in moments if 'params' in name]
  assert len(of_base) == 2
  assert all(name.endswith('params/layer_1/attn/v/w') for name in of_base)


class TestAccumulation:
  """Parts of a batch are summed, and divided once by all their tokens."""

  def run(self, parts, batch):
    config = dataclasses.replace(toy.ADAMW, accumulate_steps=parts)
    return toy.train(variables(jnp.bfloat16), [batch] * 2, optimizer_config=config)

  @pytest.fixture(scope='class', name='batch')
  @classmethod
  def ragged(cls):
    """Rows 0 and 3 (one part of three) hold most of the tokens that count."""
    batch = toy.batch(rows=6)
    keep = np.ones((6, 1), np.float32)
    keep[[1, 4]] = 0
    weights = np.array(batch['weights'] * keep)
    weights[[2, 5], 2:] = 0
    return {**batch, 'weights': jnp.asarray(weights)}

  def test_equals_the_full_batch(self, batch):
    whole, parts = self.run(1, batch), self.run(3, batch)
    for got, want in zip(parts.metrics, whole.metrics, strict=True):
      toy.assert_close(got, want, 1e-5)
    toy.assert_close(parts.state.trainable, whole.state.trainable, 1e-5)

  def test_a_batch_without_a_supervised_token_gives_zero(self, batch):
    empty = {**batch, 'weights': jnp.zeros_like(batch['weights'])}
    run = self.run(3, empty)
    assert run.losses == [0.0, 0.0]
    assert all(m['grad_norm'] == 0.0 for m in run.metrics)
    for name, x in pytree.items(run.state.trainable):
      assert np.isfinite(x).all(), name


class TestDropout:
  """Its key is a function of seed, step and part; evaluation has none."""

  CONFIG = LoraConfig(rank=3, targets='v', dropout=0.5)

  def losses(self, seed):
    run = toy.train(
      {'params': toy.base(), 'lora': toy.factors(lora_config=self.CONFIG)},
      [toy.batch()] * 2,
      lora_config=self.CONFIG,
      optimizer_config=OptimizerConfig(learning_rate=1e-30),
      seed=seed,
    )
    return run.losses

  def test_draws_anew_at_each_step_and_seed_and_nothing_else(self):
    first, second = self.losses(seed=0)
    assert first != second  # the weights stand still
    assert self.losses(seed=0) == [first, second]
    assert self.losses(seed=1)[0] not in (first, second)

  def test_evaluation_is_without(self):
    programs = {
      str(
        jax.make_jaxpr(step_lib.make_eval_step(Model(Transformer(toy.FULL, dropout=rate))))(
          *whole(variables(), 2.0), toy.batch()
        )
      )
      for rate in (0.0, 0.5)
    }
    assert len(programs) == 1
    assert 'random' not in programs.pop()


class TestEvaluation:
  def losses(self, batch):
    return np.asarray(evaluate()(variables(), batch))

  def test_ignores_what_stands_where_nothing_is_supervised(self):
    batch = toy.batch()
    is_padding = np.asarray(batch['segment_ids']) == 0
    assert is_padding.any()
    other = {
      **batch,
      'tokens': jnp.where(is_padding, 7, batch['tokens']),
      'targets': jnp.where(batch['weights'] == 0, 9, batch['targets']),
    }
    losses = self.losses(batch)
    np.testing.assert_array_equal(losses, self.losses(other))
    np.testing.assert_array_equal(losses > 0, batch['weights'] > 0)

  def test_packed_equals_unpacked(self):
    """Both documents of row 0 in one row, then each in its own."""
    batch = jax.device_get(toy.batch())
    alone = jax.tree.map(np.zeros_like, batch)
    for row, segment in ((0, 1), (1, 2)):
      place = batch['segment_ids'][0] == segment
      for name, x in batch.items():
        alone[name][row, : place.sum()] = x[0, place]
    packed, unpacked = self.losses(batch)[0], self.losses(alone)
    toy.assert_close(unpacked.sum(), packed.sum(), 1e-5)
    toy.assert_close(unpacked[0].sum(), packed[:5].sum(), 1e-5)


def shapes_in(jaxpr):
  """Shapes of every intermediate, inner programs included."""
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield getattr(variable.aval, 'shape', ())
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from shapes_in(inner)


@pytest.mark.parametrize('trainable', [('lora/',), ('lora/', 'params/')])
def test_no_step_holds_the_logits_of_a_batch(trainable):
  """[B, T, V] would be half a gigabyte for 512 tokens of the real model."""
  config, rows, length = toy.FULL, 3, 353
  tree = {'params': layout.abstract_params(config), 'lora': jax.eval_shape(toy.factors)}
  tx = optimizer.make_optimizer(OptimizerConfig(), 3, trainable)
  leaves, frozen = state_lib.split(tree, trainable)
  step = step_lib.make_train_step(
    Model(Transformer(config)), step_lib.token_loss, lambda _: (tx, None)
  )
  state = jax.eval_shape(lambda t: state_lib.init_state(t, tx), leaves)
  jaxpr = jax.make_jaxpr(step)(state, HYPER, frozen, toy.batch(rows, length))
  with_vocabulary = {
    math.prod(s) // config.vocab_size for s in shapes_in(jaxpr.jaxpr) if config.vocab_size in s
  }
  assert with_vocabulary  # the search does see the chunks
  assert max(with_vocabulary) <= vocabulary_walk.CPU_CHUNK[0][0] < rows * length


def test_a_frozen_bases_gradient_is_not_even_traced(monkeypatch):
  """Neither a kernel's gradient nor the embedding's has a place in the step."""
  monkeypatch.setattr(vocabulary_walk, 'CPU_CHUNK', ((5,), 11))  # tiles smaller than V
  tree = {
    'params': layout.abstract_params(toy.FULL),
    'lora': jax.eval_shape(lambda: toy.factors(lora_config=LoraConfig(rank=3, targets='q'))),
  }
  tx = optimizer.make_optimizer(OptimizerConfig(), 3, ('lora/',))
  leaves, frozen = state_lib.split(tree, ('lora/',))
  step = step_lib.make_train_step(
    Model(Transformer(toy.FULL)), step_lib.token_loss, lambda _: (tx, None)
  )
  state = jax.eval_shape(lambda t: state_lib.init_state(t, tx), leaves)
  out = jax.make_jaxpr(step)(state, HYPER, frozen, toy.batch())
  D, F, V = toy.FULL.embed_dim, toy.FULL.hidden_dim, toy.FULL.vocab_size
  shapes = set(shapes_in(out.jaxpr))
  # Down's kernel is read in this shape and never written in it.
  assert (V, D) not in shapes
  assert (toy.FULL.num_layers, F, D) not in shapes


def test_an_adapter_of_the_other_form_is_refused():
  """The model would find no factors and compute the base."""
  config = toy.PLAIN
  eval_step = step_lib.make_eval_step(Model(Transformer(config, scan_layers=True, remat='none')))
  variables = {
    'params': toy.base(config),
    'lora': toy.factors(config, toy.ALL_TARGETS, scan_layers=False),
  }
  with pytest.raises(ValueError, match='the adapter is unrolled, the base scanned'):
    eval_step(*whole(variables), toy.batch(2, 7))


@pytest.fixture(scope='module')
def skipping_step():
  """A jitted step that leaves out what is not finite, and a state for it."""
  tx = optimizer.make_optimizer(toy.ADAMW, 10, ('lora/',))
  schedule = optimizer.make_schedule(toy.ADAMW, 10)
  step = step_lib.make_train_step(
    Model(Transformer(toy.FULL)),
    step_lib.token_loss,
    lambda _: (tx, schedule),
  )
  trainable, frozen = state_lib.split(variables(), ('lora/',))
  step = jax.jit(step)
  # Moments that are not zero, so that a change of them would be seen.
  state, _ = step(state_lib.init_state(trainable, tx), HYPER, frozen, toy.batch())
  return lambda state, batch: step(state, HYPER, frozen, batch), state


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_left_out(skipping_step, value):
  step, state = skipping_step
  batch = toy.batch()
  batch['weights'] = batch['weights'].at[1, 2].set(value)
  after, metrics = step(state, batch)
  assert not math.isfinite(float(metrics['grad_norm'] + metrics['loss']))
  assert after.step == state.step + 1
  toy.assert_equal(after.trainable, state.trainable)
  for name, x in toy.optimizer_leaves(after).items():
    np.testing.assert_array_equal(x, toy.optimizer_leaves(state)[name])


def test_a_finite_update_is_not_left_out(skipping_step):
  step, state = skipping_step
  after, _ = step(state, toy.batch(seed=1))
  for (name, x), (_, old) in zip(
    pytree.items(after.trainable), pytree.items(state.trainable), strict=True
  ):
    assert np.all(np.asarray(x) != np.asarray(old)), name


PAIRS = {'chosen': toy.batch(4, seed=1), 'rejected': toy.batch(4, seed=2)}


def margin_loss(model, variables, batch, key):
  """A loss of pairs whose rows weigh differently, with two metrics of its own."""
  log_likelihoods = [
    -jnp.sum(model.token_losses(variables, batch[name], key), axis=-1)
    for name in ('chosen', 'rejected')
  ]
  margin = log_likelihoods[0] - log_likelihoods[1]
  weights = jnp.sum(batch['chosen']['weights'], axis=-1)
  rows = jnp.float32(len(margin))
  metrics = {'margin': (jnp.sum(margin), rows), 'wins': (jnp.sum(margin > 0), rows)}
  return jnp.sum(-weights * jax.nn.log_sigmoid(margin)), jnp.sum(weights), metrics


class TestLossOfYourOwn:
  """Any sum, weight and metrics, of a batch of any structure."""

  def run(self, parts, loss_fn=margin_loss, batch=PAIRS, steps=2):
    tx = optimizer.make_optimizer(toy.ADAMW, 10, ('lora/',))
    step = jax.jit(
      step_lib.make_train_step(
        Model(Transformer(toy.FULL)), loss_fn, lambda _: (tx, None), accumulate_steps=parts
      )
    )
    trainable, frozen = state_lib.split(variables(), ('lora/',))
    state = state_lib.init_state(trainable, tx)
    measured = []
    for _ in range(steps):
      state, metrics = step(state, HYPER, frozen, batch)
      measured.append(jax.device_get(metrics))
    return state, measured

  def test_four_parts_are_one(self):
    (whole, metrics), (parts, of_parts) = self.run(1), self.run(4)
    names = {'loss', 'weight', 'tokens', 'grad_norm', 'learning_rate', 'margin', 'wins'}
    for got, want in zip(of_parts, metrics, strict=True):
      assert got.keys() == want.keys() == names
      assert np.isnan(got.pop('learning_rate')) and np.isnan(want.pop('learning_rate'))
      toy.assert_close(got, want, 1e-5)
    toy.assert_close(parts.trainable, whole.trainable, 1e-5)

  def test_metrics_are_what_the_loss_says_of_the_whole_batch(self):
    _, (metrics, after) = self.run(4)
    eval_step = step_lib.make_eval_step(Model(Transformer(toy.FULL)), margin_loss)
    total, weight, pairs = jax.jit(eval_step)(*whole(variables()), PAIRS)
    toy.assert_close(metrics['loss'], total / weight, 1e-5)
    assert metrics['weight'] == weight == PAIRS['chosen']['weights'].sum()
    for name, (x, w) in pairs.items():
      assert w == 4
      toy.assert_close(metrics[name], x / w, 1e-5)
    # Tokens are those of both halves of a pair, read in any part.
    count = sum(int((half['segment_ids'] > 0).sum()) for half in PAIRS.values())
    assert metrics['tokens'] == count
    assert after['loss'] < metrics['loss']

  def test_a_batch_without_token_rows_counts_none(self):
    def norm(model, variables, batch, key):
      del model, key
      b = variables['lora']['layers']['attn']['q']['lora_b']
      rows, (extra, _) = batch
      return jnp.sum(b**2) * jnp.sum(rows) + jnp.sum(extra), jnp.sum(rows), {}

    batch = (jnp.arange(4.0), (jnp.ones((4, 3)), jnp.zeros((4, 2, 2), jnp.int32)))
    (whole, metrics), (parts, of_parts) = (self.run(n, norm, batch, steps=1) for n in (1, 2))
    assert metrics[0]['tokens'] == of_parts[0]['tokens'] == 0
    assert metrics[0]['weight'] == 6
    toy.assert_close(parts.trainable, whole.trainable, 1e-5)

  def test_a_weight_of_zero_divides_nothing(self):
    def empty(model, variables, batch, key):
      total, _, _ = step_lib.token_loss(model, variables, batch, key)
      return 0 * total, 0.0, {'nothing': (0, 0)}

    _, (metrics,) = self.run(2, empty, toy.batch(4), steps=1)
    assert (metrics['loss'], metrics['grad_norm'], metrics['nothing']) == (0, 0, 0)
    assert metrics['nothing'].dtype == np.float32

  def test_a_weight_below_one_is_divided_by(self):
    scaled = 0.25

    def light(model, variables, batch, key):
      total, weight, _ = step_lib.token_loss(model, variables, batch, key)
      small = scaled / weight
      return total * small, weight * small, {'half': (0.125, 0.25)}

    _, (got,) = self.run(1, light, toy.batch(4), steps=1)
    _, (want,) = self.run(1, step_lib.token_loss, toy.batch(4), steps=1)
    toy.assert_close(
      [got[n] for n in ('loss', 'grad_norm')], [want['loss'], want['grad_norm']], 1e-5
    )
    assert (got['weight'], got['half']) == (scaled, 0.5)

  @pytest.mark.parametrize(
    ('returned', 'message'),
    [
      (lambda x: x, r'got an array \[\] of float32'),
      (lambda x: None, 'got NoneType'),
      (lambda x: (x, x), 'got a tuple of 2'),
      (lambda x: [x, x, {}], 'got list'),
      (lambda x: (x, x, [('a', x)]), 'got a tuple of 3'),
      (lambda x: (x[None], x, {}), r'got an array \[1\] of float32 for the sum'),
      (lambda x: (x, jnp.ones((2, 11)), {}), r'got an array \[2, 11\] of float32 for the weight'),
      (lambda x: (x > 0, x, {}), r'got an array \[\] of bool for the sum'),
      (lambda x: (x, x, {'a': x}), r"got an array \[\] of float32 for the metric 'a'"),
      (lambda x: (x, x, {'a': (x, x, x)}), "got a tuple of 3 for the metric 'a'"),
      (lambda x: (x, x, {'a': (x[None], x)}), r'got an array \[1\] of float32 for the sum of a'),
      (lambda x: (x, x, {'a': (x, x[None])}), r'got an array \[1\] .* for the weight of a'),
      (lambda x: (x, 'all', {}), 'got str for the weight'),
      (lambda x: (x, None, {}), 'got NoneType for the weight'),
      (lambda x: (x, {'a': x}, {}), 'got dict for the weight'),
      (lambda x: (x, x, {'loss': (x, x)}), "got a metric named 'loss', expected none of"),
      (lambda x: (x, x, {'tokens': (x, x)}), "got a metric named 'tokens', expected none of"),
    ],
  )
  def test_a_loss_that_returns_something_else_is_refused(self, returned, message):
    def loss_fn(model, variables, batch, key):
      return returned(step_lib.token_loss(model, variables, batch, key)[0])

    model, batch = Model(Transformer(toy.FULL)), toy.batch()
    tx = optimizer.make_optimizer(toy.ADAMW, 10, ('lora/',))
    step = step_lib.make_train_step(model, loss_fn, lambda _: (tx, None))
    trainable, frozen = state_lib.split(variables(), ('lora/',))
    state = jax.eval_shape(lambda t: state_lib.init_state(t, tx), trainable)
    with pytest.raises(ValueError, match=f'^loss_fn: {message}'):
      jax.eval_shape(step, state, HYPER, frozen, batch)
    eval_step = step_lib.make_eval_step(model, loss_fn)
    with pytest.raises(ValueError, match=f'^loss_fn: {message}'):
      jax.eval_shape(eval_step, trainable, HYPER, frozen, batch)
