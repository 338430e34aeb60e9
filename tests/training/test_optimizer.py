"""Schedule, clip, decay and freeze, each by what it does to an update."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma_jax import pytree
from gemma_jax.config.train import OptimizerConfig
from gemma_jax.training import optimizer

CONFIG = OptimizerConfig(learning_rate=0.5, clip_norm=0.0, weight_decay=0.0, schedule='constant')
TREE = {
  'params': {'attn': {'w': jnp.full((3, 5), 2.0)}},
  'lora': {'lora_a': jnp.full((7,), 3.0), 'norm': {'scale': jnp.full(2, 4.0)}},
}


def update(config, grads, trainable=('lora/',), steps=11, params=TREE):
  """Updates and state after the first call of the optimizer."""
  tx = optimizer.make_optimizer(config, steps, trainable)
  return tx.update(grads, tx.init(params), params)


class TestSchedule:
  def rates(self, steps, **fields):
    config = dataclasses.replace(CONFIG, **fields)
    schedule = optimizer.make_schedule(config, steps)
    return [float(schedule(jnp.int32(i))) for i in range(steps)]

  def test_constant_after_a_warm_up_whose_first_update_learns(self):
    rates = self.rates(7, warmup_steps=4)
    np.testing.assert_allclose(rates, [0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5], rtol=1e-6)

  def test_without_warm_up_the_first_rate_is_the_peak(self):
    assert self.rates(3) == [0.5, 0.5, 0.5]

  def test_linear_would_reach_zero_one_update_after_the_last(self):
    rates = self.rates(6, schedule='linear', warmup_steps=2)
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.5, 0.375, 0.25, 0.125], rtol=1e-6)

  def test_cosine(self):
    rates = self.rates(6, schedule='cosine', warmup_steps=2)
    want = [0.25, 0.5] + [0.25 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    np.testing.assert_allclose(rates, want, rtol=1e-6)

  @pytest.mark.parametrize('form', ['constant', 'linear', 'cosine'])
  def test_a_warm_up_longer_than_the_run_just_never_ends(self, form):
    rates = self.rates(3, schedule=form, warmup_steps=10)
    np.testing.assert_allclose(rates, [0.05, 0.1, 0.15], rtol=1e-6)

  def test_the_optimizer_follows_it(self):
    """AdamW's first update is the rate itself, whatever the gradient."""
    config = dataclasses.replace(CONFIG, warmup_steps=4, eps=1e-12)
    updates, _ = update(config, jax.tree.map(jnp.ones_like, TREE))
    np.testing.assert_allclose(updates['lora']['lora_a'], -0.125, rtol=1e-5)


class TestFreeze:
  def test_frozen_leaves_get_zero_updates_and_no_moments(self):
    config = dataclasses.replace(CONFIG, weight_decay=0.1)
    updates, state = update(config, jax.tree.map(jnp.ones_like, TREE))
    np.testing.assert_array_equal(updates['params']['attn']['w'], 0.0)
    moments = [x for n, x in pytree.items(state) if 'u/' in n]
    assert pytree.num_params(moments) == 2 * (7 + 2)
    # Adam's count and the schedule's; nothing else, and nothing of the base.
    assert pytree.num_params(state) == 2 * (7 + 2) + 2
    assert not [n for n, _ in pytree.items(state) if 'params' in n]

  def test_a_trained_base_leaf_has_moments_too(self):
    _, state = update(CONFIG, jax.tree.map(jnp.ones_like, TREE), ('lora/lora_a', 'params/'))
    assert pytree.num_params(state) == 2 * (7 + 15) + 2

  def test_it_is_outermost(self):
    """A frozen leaf's gradient, however large, takes no part in clipping."""
    config = dataclasses.replace(CONFIG, clip_norm=1.0)
    small = jax.tree.map(jnp.ones_like, TREE)
    large = {**small, 'params': jax.tree.map(lambda x: 1e9 * x, TREE['params'])}
    bad = {**small, 'params': jax.tree.map(lambda x: x * jnp.nan, TREE['params'])}
    want, want_state = update(config, small)
    for grads in (large, bad):
      got, state = update(config, grads)
      jax.tree.map(np.testing.assert_array_equal, got, want)
      jax.tree.map(np.testing.assert_array_equal, state, want_state)

  def test_a_tree_of_the_trainable_leaves_alone_gives_the_same(self):
    """What the train step hands over: holes where leaves are frozen."""
    config = dataclasses.replace(CONFIG, clip_norm=1.0, weight_decay=0.1)
    grads = jax.tree.map(lambda x: 0.3 * x, TREE)
    whole, _ = update(config, grads)
    mask = pytree.mask(TREE, ('lora/',))
    part, _ = update(
      config, pytree.partition(grads, mask)[0], params=pytree.partition(TREE, mask)[0]
    )
    jax.tree.map(np.testing.assert_array_equal, part['lora'], whole['lora'])
    assert not jax.tree.leaves(part['params'])


def test_clips_by_the_global_norm_of_the_trainable_leaves():
  """Seen in the first moment, (1 - b1) times the clipped gradient."""
  config = dataclasses.replace(CONFIG, clip_norm=0.5)
  grads = jax.tree.map(jnp.ones_like, TREE)  # norm 3 over lora's 9 values
  _, state = update(config, grads)
  mu = [x for n, x in pytree.items(state) if '/mu/' in f'/{n}']
  np.testing.assert_allclose(optax.tree.norm(mu), (1 - config.b1) * 0.5, rtol=1e-5)
  _, state = update(dataclasses.replace(config, clip_norm=7.0), grads)
  mu = [x for n, x in pytree.items(state) if '/mu/' in f'/{n}']
  np.testing.assert_allclose(optax.tree.norm(mu), (1 - config.b1) * 3.0)


def test_weight_decay_is_decoupled_and_spares_norm_scales():
  config = dataclasses.replace(CONFIG, weight_decay=0.1)
  updates, _ = update(config, jax.tree.map(jnp.zeros_like, TREE))
  np.testing.assert_allclose(updates['lora']['lora_a'], -0.5 * 0.1 * 3.0, rtol=1e-6)
  np.testing.assert_array_equal(updates['lora']['norm']['scale'], 0.0)


def test_equals_adamw_written_out():
  config = OptimizerConfig(
    learning_rate=0.3, weight_decay=0.2, b1=0.8, b2=0.95, eps=1e-3, clip_norm=0
  )
  tx = optimizer.make_optimizer(config, 5, ('lora/',))
  params = {'lora': {'a': jnp.array([1.0, -2.0, 3.0])}}
  state = tx.init(params)
  p, m, v = np.array([1.0, -2.0, 3.0]), np.zeros(3), np.zeros(3)
  for t in range(1, 4):
    g = np.array([0.5, -0.1, 0.2]) * t
    m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
    step = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3)
    p = p - 0.3 * (step + 0.2 * p)
    updates, state = tx.update({'lora': {'a': jnp.array(g)}}, state, params)
    params = optax.apply_updates(params, updates)
  np.testing.assert_allclose(params['lora']['a'], p, atol=1e-5)
