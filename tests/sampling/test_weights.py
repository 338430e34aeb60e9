"""Bases for decoding: the same model, shared leaves, the cost of int8."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import pytree
from gemma_jax.config.train import LoraConfig
from gemma_jax.formats import open_base
from gemma_jax.lora import align
from gemma_jax.model import layout
from gemma_jax.model.rows import Rows
from gemma_jax.model.transformer import Transformer
from gemma_jax.sampling import weights
from tests import toy

pytestmark = [
  pytest.mark.usefixtures('strict', 'quick_compile'),
  pytest.mark.filterwarnings('error'),
]

TOKENS = toy.batch()['tokens']


@functools.cache
def _apply(scan_layers):
  model = Transformer(toy.FULL, scan_layers=scan_layers, remat='none')

  @jax.jit
  def logits(variables):
    hidden = model.apply(variables, TOKENS)
    return model.apply(variables, hidden, method='logits')

  return logits


def logits_of(variables, scan_layers=True):
  return np.asarray(_apply(scan_layers)(variables))


@pytest.mark.parametrize('scan_layers', [True, False])
def test_prepared_variables_are_the_same_model(scan_layers):
  variables = {
    'params': toy.base(scan_layers=scan_layers),
    'lora': toy.factors(scan_layers=scan_layers),
  }
  ready = weights.prepare(variables)
  assert pytree.num_params(ready) == pytree.num_params(variables)
  got, want = (logits_of(v, scan_layers) for v in (ready, variables))
  toy.assert_close(got, want, 1e-5)


def test_int8_logits_are_near():
  """Rounding to 1/254 of the largest weight is noise of a percent or so."""
  variables = {'params': toy.base(), 'lora': toy.factors()}
  ready = weights.prepare(variables, 'int8')
  want = logits_of(variables)
  error = logits_of(ready) - want
  assert 1e-4 < np.sqrt(np.mean(error**2)) < 0.03 * np.std(want)
  is_norm = lambda name: name.endswith('scale')
  kept = dict(pytree.items(ready['params']))
  assert kept.keys() == {n for n, _ in pytree.items(variables['params']) if is_norm(n)}
  assert all(
    isinstance(leaf, Rows) and leaf.values.dtype == jnp.int8
    for leaf in jax.tree.leaves(ready['rows'], is_leaf=lambda x: isinstance(x, Rows))
  )


def test_scanned_and_unrolled_quantize_alike():
  stacked = weights.prepare({'params': toy.base()}, 'int8')['rows']
  apart = weights.prepare({'params': toy.base(scan_layers=False)}, 'int8')['rows']
  toy.assert_equal(layout.unstack_layers(stacked), apart)


def test_adapters_share_the_base_unless_they_trained_some_of_it():
  plain = toy.lora(lora_config=LoraConfig(rank=2))
  base, a = align.align([dataclasses.replace(plain, factors={}), plain])
  kernel = {'layers': {'mlp': {'up': {'w': np.ones((3, 13, 17), np.float32)}}}}
  made = weights.for_adapters(
    toy.base(),
    {'base': base, 'A': a, 'B': dataclasses.replace(a, trained_base=kernel)},
    'int8',
  )
  rows = {name: jax.tree.leaves(v['rows']) for name, v in made.items()}
  pairs = zip(rows['base'], rows['A'], strict=True)
  assert all(a is b for a, b in pairs)
  up = made['B']['rows']['layers']['mlp']['up']['w']
  assert (up.values == 127).all()
  np.testing.assert_allclose(up.scale, 1 / 127, rtol=1e-6)


def test_unknown_weights_are_refused():
  with pytest.raises(ValueError, match=r"weights: got 'int4', expected one of"):
    weights.prepare({'params': {}}, 'int4')


@pytest.mark.real
def test_int8_costs_the_real_model_little():
  """Log-likelihoods of the oracle's prompts, in nats a token."""
  path = Path(__file__).parents[1] / 'golden' / 'oracle_gemma3_270m.json'
  prompts = json.loads(path.read_text('utf-8'))['prompts']
  found = open_base.open_base(open_base.REAL_270M)
  model = Transformer(found.config, remat='none')
  ready = weights.prepare({'params': found.load_params('float32')}, 'int8')
  longest = max(len(p['ids']) for p in prompts)

  @jax.jit
  def token_loglik(variables, ids):  # [1, T] -> [T - 1]
    hidden = model.apply(variables, ids)[:, :-1]
    logits = model.apply(variables, hidden, method='logits')[0]
    chosen = jnp.take_along_axis(logits, ids[0, 1:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=1)

  total, tokens = 0.0, 0
  for prompt in prompts:
    ids, count = prompt['ids'], len(prompt['ids']) - 1
    padded = np.array([ids + [0] * (longest - len(ids))], np.int32)
    got = np.asarray(token_loglik(ready, padded))[:count]
    want = np.array(prompt['token_loglik'])
    total += float((got - want).sum())
    tokens += count
  print(f'int8: {total / tokens:+.4f} nats a token over {tokens} tokens')
  assert 1e-5 < abs(total / tokens) < 0.02
