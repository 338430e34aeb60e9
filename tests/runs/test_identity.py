"""One loss is told from another by what it computes, and only by that."""

import functools

import jax
import numpy as np
import optax
import pytest

from gemma_jax.runs.identity import of_function
from gemma_jax.training.step import token_loss

SOURCE = """
SHARE = {share}
TABLE = np.arange({size})

def helper(x):
  return x {sign} 1

def outer(gamma):
  def loss_fn(model, variables, batch, key, power=2):
    inner = lambda x: helper(x) * TABLE[0] ** power
    return inner(gamma) * SHARE
  return loss_fn

class Loss:
  def __init__(self, gamma):
    self.gamma = gamma
  def __call__(self, x):
    return x {sign} self.gamma

{comment}
plain = lambda x: x {sign} 1
"""


def module(**changes):
  """What a notebook's cell leaves behind."""
  values = {'share': 0.5, 'size': 3, 'sign': '+', 'comment': '', **changes}
  space = {'__name__': '__main__', 'np': np}
  exec(SOURCE.format(**values), space)
  return space


@pytest.mark.parametrize(
  'make',
  [
    lambda gamma=2.0, **changes: module(**changes)['outer'](gamma),
    lambda gamma=2.0, **changes: module(**changes)['Loss'](gamma),
    lambda gamma=2.0, **changes: functools.partial(module(**changes)['plain'], gamma),
    lambda gamma=2.0, **changes: jax.jit(module(**changes)['outer'](gamma)),
  ],
  ids=['closure', 'object', 'partial', 'jitted'],
)
def test_the_same_and_another(make):
  first = of_function(make())
  assert of_function(make(comment='# said anew')) == first
  assert of_function(make(gamma=3.0)) != first
  assert of_function(make(sign='-')) != first


@pytest.mark.parametrize('change', [{'share': 0.7}, {'size': 4}])
def test_values_of_the_module_count(change):
  loss_fn = lambda **changes: of_function(module(**changes)['outer'](2.0))
  assert loss_fn(**change) != loss_fn()


def test_optax_transformations():
  make = lambda rate, **more: of_function(optax.chain(optax.clip(1.0), optax.adam(rate, **more)))
  assert make(1e-3) == make(1e-3)
  assert len({make(1e-3), make(1e-1), make(1e-3, b1=0.5)}) == 3
  schedule = lambda end: make(optax.linear_schedule(1e-3, end, 10))
  assert schedule(0.0) == schedule(0.0) != schedule(1e-4)


def test_names():
  assert of_function(token_loss).startswith('gemma_jax.training.step.token_loss ')
  assert of_function(functools.partial(module()['plain'], 2)).startswith('__main__.<lambda> ')


def test_a_cycle_ends():
  def loss_fn(x):
    return loss_fn(x)

  assert of_function(loss_fn) == of_function(loss_fn)
