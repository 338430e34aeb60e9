"""DoRA: magnitudes beside the factors of `lora`, and ranks by layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import pytree
from gemma_jax.config.train import LoraConfig, OptimizerConfig
from gemma_jax.formats import adapter, peft
from gemma_jax.lora import factors as factors_lib
from gemma_jax.model import layout
from gemma_jax.model.transformer import Transformer
from gemma_jax.sampling import weights
from gemma_jax.training import optimizer
from gemma_jax.training.model import Model
from tests import toy

pytestmark = [
  pytest.mark.usefixtures('strict', 'quick_compile'),
  pytest.mark.filterwarnings('error'),
]

SCALE = 1.7
CONFIG = LoraConfig(rank=3, targets='all', dora=True)
KERAS = dataclasses.replace(CONFIG, factorization='keras')
# A kernel's inputs, as axes of one layer's leaf.
INPUTS = {
  'attn/q': (1,),
  'attn/k': (1,),
  'attn/v': (1,),
  'attn/o': (0, 1),
  'mlp/gate': (0,),
  'mlp/up': (0,),
  'mlp/down': (0,),
}


@pytest.fixture(scope='module')
def params():
  return toy.base()


@pytest.fixture(scope='module')
def hidden():
  """variables → hidden [2, 11, D], compiled once for each structure."""
  model, tokens = Transformer(toy.FULL), toy.batch()['tokens']
  return jax.jit(lambda variables: model.apply(variables, tokens))


def adapted(params, factors, scale=SCALE):
  return factors_lib.variables(params, factors, scale)


def lengths(params, module):
  """||W|| of each output of a module, by definition, in float64."""
  layer, path = module.split('/', 1)
  axes = tuple(axis + (layer == 'layers') for axis in INPUTS[path])
  w = np.asarray(dict(pytree.items(params))[f'{module}/w'], np.float64)
  return np.sqrt((w**2).sum(axes))


def magnitudes(tree):
  return {n: x for n, x in pytree.items(tree) if n.endswith('lora_magnitude')}


@pytest.mark.parametrize('config', [CONFIG, KERAS], ids=['matrix', 'keras'])
@pytest.mark.parametrize('scan_layers', [True, False])
def test_magnitudes_start_as_the_lengths_of_the_base(config, scan_layers):
  params = toy.base(scan_layers=scan_layers)
  start = factors_lib.init(jax.random.key(0), toy.FULL, config, scan_layers)
  got = magnitudes(factors_lib.with_magnitudes(start, params))
  assert len(got) == 7 * (1 if scan_layers else toy.FULL.num_layers)
  for name, m in got.items():
    want = lengths(params, name.removesuffix('/lora_magnitude'))
    toy.assert_close(m, want, 1e-6, name)


@pytest.mark.parametrize('config', [CONFIG, KERAS], ids=['matrix', 'keras'])
def test_a_new_adapter_is_the_base_up_to_the_rounding_of_a_norm(hidden, params, config):
  start = factors_lib.init(jax.random.key(0), toy.FULL, config)
  start = factors_lib.with_magnitudes(start, params)
  got = hidden(adapted(params, start))
  toy.assert_close(got, hidden({'params': params}), 1e-5)


def test_a_magnitude_of_zero_is_plain_lora_to_the_bit(hidden, params):
  factors = toy.factors(toy.FULL, CONFIG)
  factors = pytree.map_with_name(
    lambda name, x: 0 * x if name.endswith('magnitude') else x, factors
  )
  got = hidden(adapted(params, factors))
  plain = toy.factors(toy.FULL, dataclasses.replace(CONFIG, dora=False))
  want = hidden(adapted(params, plain))
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('config', [CONFIG, KERAS], ids=['matrix', 'keras'])
def test_merged_equals_adapter_and_has_its_lengths(hidden, params, config):
  factors = toy.factors(toy.FULL, config)
  beside = hidden(adapted(params, factors))
  merged = factors_lib.merge(params, factors, SCALE)
  toy.assert_close(hidden({'params': merged}), beside, 1e-4)
  assert np.abs(hidden({'params': params}) - beside).max() > 0.1
  for name, m in magnitudes(factors).items():
    got = lengths(merged, name.removesuffix('/lora_magnitude'))
    toy.assert_close(got, np.abs(m), 1e-5, name)


def test_scanned_equals_unrolled_and_streamed(params):
  """Gains are a layer's own, and the same wherever they are computed."""
  factors = toy.factors(toy.FULL, CONFIG)
  scanned = layout.unstack_layers(adapted(params, factors)['lora'])
  layers, of_layers = layout.unstack_layers(params), layout.unstack_layers(factors)
  unrolled = adapted(layers, of_layers)['lora']
  toy.assert_close(scanned, unrolled, 1e-6)
  one = adapted(layers['layer_1'], of_layers['layer_1'])['lora']
  toy.assert_close(one, unrolled['layer_1'], 1e-6)


def test_adapters_train_side_by_side_under_vmap(params):
  """Losses and gradients of a batch of adapters are those of each alone."""
  model, batch = Model(Transformer(toy.FULL)), toy.batch()

  def loss(factors):
    return jnp.sum(model.hidden(adapted(params, factors), batch))

  first = toy.factors(toy.FULL, dataclasses.replace(CONFIG, targets='q|o'))
  second = jax.tree.map(lambda x: 0.5 * x, first)
  both = jax.tree.map(lambda *x: jnp.stack(x), first, second)
  got = jax.jit(jax.vmap(jax.grad(loss)))(both)
  alone = jax.jit(jax.grad(loss))
  for i, factors in enumerate((first, second)):
    want = alone(factors)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(want))
    got_i = jax.tree.map(lambda x, i=i: x[i], got)
    for name, x in pytree.items(want):
      other = dict(pytree.items(got_i))[name]
      toy.assert_close(other / largest, x / largest, 1e-5, name)
    assert all(np.abs(x).max() > 0 for x in magnitudes(want).values())


def test_the_model_does_not_take_magnitudes_for_gains(hidden, params):
  factors = toy.factors(toy.FULL, CONFIG)
  with pytest.raises(ValueError, match='got magnitudes, expected gains: use the result of Lora'):
    hidden({'params': params, 'lora': factors})


def test_weight_decay_spares_magnitudes():
  config = OptimizerConfig(weight_decay=0.1)
  params = {'lora': {'lora_a': jnp.ones(3), 'lora_magnitude': jnp.ones(5)}}
  with jax.numpy_dtype_promotion('standard'):
    tx = optimizer.make_optimizer(config, 1, ('lora/',))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  assert np.all(updates['lora']['lora_a'] < 0)
  np.testing.assert_array_equal(updates['lora']['lora_magnitude'], 0)


def test_beside_other_adapters_in_one_program(hidden, params, tmp_path):
  """Base and plain adapter next to DoRA: each to the bit what it is alone."""
  configs = {'dora': CONFIG, 'plain': LoraConfig(rank=2, targets='qv')}
  for name, config in configs.items():
    peft.write_adapter(tmp_path / name, toy.factors(toy.FULL, config), config, 'toy')
  paths = [str(tmp_path / name) for name in configs]
  loaded = adapter.load_adapters(paths, toy.FULL)
  variables = {name: lora.variables(params) for name, lora in loaded.items()}
  shapes = [jax.tree.map(jnp.shape, each) for each in variables.values()]
  assert shapes[0] == shapes[1] == shapes[2]
  decoded = weights.for_adapters(params, loaded)
  for name, each in variables.items():
    toy.assert_equal(decoded[name]['lora'], each['lora'])
  base, dora, plain = map(hidden, variables.values())
  np.testing.assert_array_equal(base, hidden({'params': params}))
  factors = toy.factors(toy.FULL, CONFIG)
  alone = adapted(params, factors, CONFIG.scale)
  toy.assert_close(dora, hidden(alone), 1e-6)
  config = configs['plain']
  factors = toy.factors(toy.FULL, config)
  alone = adapted(params, factors, config.scale)
  toy.assert_close(plain, hidden(alone), 1e-6)


class TestRanks:
  config = LoraConfig(rank=2, targets='qv', ranks={'layer_1/.*': 5, '.*/v': 3})

  def test_a_is_zero_beyond_a_layers_own_rank(self):
    tree = factors_lib.init(jax.random.key(0), toy.FULL, self.config)
    ranks = {
      name: np.count_nonzero(np.any(tree['layers']['attn'][name]['lora_a'], 1), axis=-1).tolist()
      for name in 'qv'
    }
    assert ranks == {'q': [2, 5, 2], 'v': [3, 5, 3]}
    assert tree['layers']['attn']['q']['lora_b'].shape == (3, 5, 10, 14)
    wide = factors_lib.init(jax.random.key(0), toy.FULL, LoraConfig(rank=5))
    for name in 'qv':
      a = tree['layers']['attn'][name]['lora_a']
      full = wide['layers']['attn'][name]['lora_a']
      np.testing.assert_array_equal(a, np.where(a == 0, 0, full))

  def test_training_leaves_the_padding_at_zero(self, params):
    tree = factors_lib.init(jax.random.key(0), toy.FULL, self.config)
    model, batch = Model(Transformer(toy.FULL)), toy.batch()

    def loss(factors):
      return jnp.sum(model.hidden(adapted(params, factors, 1.0), batch))

    grads = jax.jit(jax.grad(loss))(tree)['layers']['attn']['q']
    assert np.all(grads['lora_b'][0, :2] != 0)
    np.testing.assert_array_equal(grads['lora_b'][0, 2:], 0)
    np.testing.assert_array_equal(grads['lora_a'][0, :, 2:], 0)

  def test_a_pattern_that_matches_nothing_is_refused(self):
    config = dataclasses.replace(self.config, ranks={'layer_3/.*': 5})
    with pytest.raises(ValueError, match=r"layer_3/\.\*' matches no target"):
      factors_lib.init(jax.random.key(0), toy.FULL, config)

  def test_it_is_written_and_read_again(self, tmp_path):
    tree = factors_lib.init(jax.random.key(0), toy.FULL, self.config)
    peft.write_adapter(tmp_path / 'a', tree, self.config, 'toy')
    config, again = peft.read_adapter(tmp_path / 'a', toy.FULL)
    toy.assert_equal(again, jax.device_get(tree))
    for i in range(3):
      for name in 'qv':
        path = f'layer_{i}/attn/{name}'
        assert config.rank_of(path) == self.config.rank_of(path)
