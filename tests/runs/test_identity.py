"""One loss is told from another by what it computes, and only by that."""

import dataclasses
import functools
import importlib
import os
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from gemma_jax.config.train import BaseConfig, MeshConfig
from gemma_jax.runs.base import Base
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


USES = """
import collections, enum, functools, re
import jax
import jax.numpy as jnp
import numpy as np

FIRST, SECOND, THIRD = {first}, {second}, {third}
TABLE = {{'rate': {table}}}
LIST = [{entry}]
WORDS = {{'a', 'b', frozenset({{'c', 'd', {word!r}}})}}
CUT = re.compile({regex!r})
LAST = collections.deque([1, {last}])
KEY = jax.random.key({key})
NAMES = np.array([None, {{'x', 'y', {word!r}}}], object)

class Mode(enum.Enum):
  ON = {mode}

class Base:
  def scaled(self, x):
    return x * {method}

class Loss(Base):
  share = {attribute}
  def __call__(self, x):
    return self.scaled(x) * self.share

class Slotted:
  __slots__ = ('gamma',)

slotted = Slotted()
slotted.gamma = {slot}
made = Loss()

@jax.custom_vjp
def bent(x):
  return x

bent.defvjp(lambda x: (x, None), lambda _, g: (g * {gradient},))

def first(x):
  return x * FIRST

def second(x):
  return x * SECOND

def third(x):
  return x * THIRD

def loss_fn(x):
  '''{doc}'''
  said = TABLE, LIST, WORDS, CUT, LAST, KEY, NAMES, Mode.ON, Loss()(x), slotted, made, bent
  return first(x) + second(x) + third(x) + jnp.{function}(x).{attribute_of}, said

print(of_function(loss_fn))
"""
USED = {
  **dict.fromkeys(('first', 'second', 'third', 'table', 'entry', 'last', 'key', 'slot'), 1),
  **dict.fromkeys(('mode', 'method', 'attribute', 'gradient'), 2),
  **{'word': 'e', 'regex': 'a+', 'function': 'mean', 'attribute_of': 'real', 'doc': 'It is.'},
}
OTHERS = {'function': 'sum', 'attribute_of': 'imag', 'word': 'f', 'regex': 'b+'}


def used(**changes):
  space = {'__name__': '__main__', 'of_function': of_function, 'print': lambda _: None}
  exec(USES.format(**{**USED, **changes}), space)
  return of_function(space['loss_fn'])


def test_what_a_function_uses_counts():
  first = used()
  assert used(doc='Said anew.') == first
  others = {name: OTHERS.get(name, 7) for name in USED if name != 'doc'}
  assert [name for name, value in others.items() if used(**{name: value}) == first] == []


@pytest.mark.parametrize('use', ['import losses', 'from losses import scaled'])
def test_a_module_of_the_user_counts(tmp_path, monkeypatch, use):
  monkeypatch.syspath_prepend(tmp_path)
  name = 'losses.scaled' if 'from' not in use else 'scaled'

  def identity(factor):
    (tmp_path / 'losses.py').write_text(f'def scaled(x):\n  return x * {factor}\n')
    monkeypatch.delitem(sys.modules, 'losses', raising=False)
    importlib.invalidate_caches()
    space = {'__name__': '__main__'}
    exec(f'{use}\ndef loss_fn(x):\n  return {name}(x)', space)
    return of_function(space['loss_fn'])

  assert identity(2.0) == identity(2.0) != identity(3.25)


def test_another_process_says_the_same():
  script = 'from gemma_jax.runs.identity import of_function\n' + USES.format(**USED)
  said = [
    subprocess.run(
      [sys.executable, '-c', '\n' * seed + script],
      env={**os.environ, 'PYTHONHASHSEED': str(seed)},
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    for seed in (1, 2)
  ]
  assert said[0] == said[1] != ''


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


def test_a_base_is_its_files():
  """Its weights are not read: hashing those of a large model would take minutes."""
  base, other = (
    Base.open(BaseConfig(path=f'random:{x}'), MeshConfig(fsdp=1)) for x in ('tiny', 'tiny2')
  )
  reads = lambda base: lambda batch: base.token_losses({'params': base.params}, batch)
  unreadable = dataclasses.replace(base, params=object.__new__(Unreadable))
  assert of_function(reads(unreadable)) == of_function(reads(base)) != of_function(reads(other))


class Unreadable:
  def __getattribute__(self, name):
    raise AssertionError(name)
