"""Adapters of different shapes, scales and targets over one base."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import pytree
from gemma_jax.config.train import LoraConfig
from gemma_jax.formats import adapter, peft
from gemma_jax.lora import align, factors
from gemma_jax.model import layout
from gemma_jax.model.transformer import Transformer
from tests import toy

pytestmark = pytest.mark.usefixtures('quick_compile')

CONFIG = toy.FULL
LORA_CONFIGS = {
  'qv': LoraConfig(rank=2, alpha=3.0, targets='qv'),
  'all': LoraConfig(rank=5, alpha=1.5, targets='all', scale_rule='alpha_over_sqrt_r'),
}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Two PEFT folders; the second has a trained base leaf, too."""
  root = tmp_path_factory.mktemp('adapters')
  trained = {'layers': {'attn': {'v': {'w': np.full((3, 2, 13, 14), 0.1)}}}}
  paths = []
  for name, config in LORA_CONFIGS.items():
    path = root / name
    peft.write_adapter(
      path, toy.factors(CONFIG, config), config, 'toy', trained if name == 'all' else None
    )
    paths.append(str(path))
  return paths


@pytest.fixture(scope='module')
def loaded(folders):
  return adapter.load_adapters(folders, CONFIG)


@pytest.fixture(scope='module')
def hidden():
  """variables → hidden [2, 11, D]; `hidden.traces` counts compilations."""
  model, tokens = Transformer(CONFIG), toy.batch()['tokens']
  traces = []

  def apply(variables):
    traces.append(1)
    return model.apply(variables, tokens)

  compiled = jax.jit(apply)
  call = lambda variables: np.asarray(compiled(variables))
  call.traces = traces
  return call


def test_they_come_with_the_base_in_front_and_share_one_shape(loaded, folders):
  assert list(loaded) == [adapter.BASE, *folders]
  shapes = [
    {name: (x.shape, x.dtype) for name, x in pytree.items(lora.factors)} for lora in loaded.values()
  ]
  assert shapes[0] == shapes[1] == shapes[2]
  assert shapes[0]['layers/attn/q/lora_a'] == ((3, 13, 5), jnp.float32)
  assert len(shapes[0]) == 14


def test_each_computes_what_it_computes_alone_in_one_program(loaded, hidden):
  params = toy.base(CONFIG)
  outputs = [hidden(lora.variables(params)) for lora in loaded.values()]
  assert len(hidden.traces) == 1
  trained = jax.tree.map(lambda x: x, params)
  trained['layers']['attn']['v']['w'] = jnp.full((3, 2, 13, 14), 0.1)
  bases = (params, params, trained)
  np.testing.assert_array_equal(outputs[0], hidden({'params': params}))
  alone = [
    hidden(factors.variables(base, toy.factors(CONFIG, config), config.scale))
    for base, config in zip(bases[1:], LORA_CONFIGS.values(), strict=True)
  ]
  for got, want in zip(outputs[1:], alone, strict=True):
    toy.assert_close(got, want, 1e-5)
    assert np.abs(got - outputs[0]).max() > 0.1


def test_no_folder_gives_the_base_alone(hidden):
  loaded = adapter.load_adapters([], CONFIG)
  base = loaded.pop(adapter.BASE)
  assert not loaded
  assert (base.factors, base.trained_base, base.trained_with) == ({}, {}, None)
  params = toy.base(CONFIG)
  np.testing.assert_array_equal(hidden(base.variables(params)), hidden({'params': params}))


def test_an_adapter_of_another_architecture_is_refused(folders):
  other = dataclasses.replace(CONFIG, embed_dim=11)
  with pytest.raises(ValueError, match=str(folders[0])):
    adapter.load_adapters(folders, other)


class TestReplaceLeaves:
  """A leaf trained in one form goes into a base of either."""

  @pytest.mark.parametrize('base_is_scanned', [True, False])
  @pytest.mark.parametrize('leaf_is_scanned', [True, False])
  def test_in_all_four_cases(self, base_is_scanned, leaf_is_scanned):
    params = toy.base(CONFIG, base_is_scanned, jnp.bfloat16)
    before = jax.device_get(params)
    shape = (2, 13, 14)
    if leaf_is_scanned:
      new = np.arange(3, dtype=np.float32)[:, None, None, None] + np.zeros(shape, np.float32)
      leaves = {'layers': {'attn': {'v': {'w': new}}}}
    else:
      leaves = {'layer_1': {'attn': {'v': {'w': np.ones(shape, np.float32)}}}}
    got = align.replace_leaves(params, leaves)
    toy.assert_equal(params, before)
    got, before = (layout.unstack_layers(t) if base_is_scanned else t for t in (got, before))
    for i in range(3):
      w = got[f'layer_{i}']['attn']['v']['w']
      assert w.dtype == jnp.bfloat16
      if leaf_is_scanned or i == 1:
        np.testing.assert_array_equal(np.asarray(w, np.float32), i)
        before[f'layer_{i}']['attn']['v']['w'] = w
    toy.assert_equal(got, before)

  def test_nothing_to_replace_gives_the_base_itself(self):
    params = toy.base(CONFIG)
    assert align.replace_leaves(params, {}) is params

  @pytest.mark.parametrize(
    ('name', 'shape', 'message'),
    [
      ('layers/attn/v/w', (3, 2, 13, 15), 'got shape .* expected'),
      ('layer_1/attn/v/w', (3, 2, 13, 14), 'got shape .* expected'),
      ('layer_3/attn/v/w', (2, 13, 14), '.*does not have'),
      ('layers/attn/w/w', (3, 2, 13, 14), '.*does not have'),
      ('head/w', (5,), '.*does not have'),
    ],
  )
  def test_what_does_not_fit_is_refused_by_name(self, name, shape, message):
    leaves = pytree.unflatten({name: np.zeros(shape, np.float32)})
    with pytest.raises(ValueError, match=f'{name}: {message}'):
      align.replace_leaves(toy.base(CONFIG), leaves)

  def test_a_scanned_leaf_of_fewer_layers_is_refused(self):
    leaves = {'layers': {'attn': {'v': {'w': np.zeros((2, 2, 13, 14))}}}}
    with pytest.raises(ValueError, match='layers/attn/v/w'):
      align.replace_leaves(toy.base(CONFIG, scan_layers=False), leaves)
