"""Splitting variables by regex, and the published counts of what is trained."""

import jax
import jax.numpy as jnp
import pytest

from gemma_jax import pytree
from gemma_jax.config.train import LoraConfig, OptimizerConfig
from gemma_jax.model import variants
from gemma_jax.training import optimizer
from gemma_jax.training import state as state_lib
from tests import toy

CONFIG = LoraConfig(rank=3, targets='qv')


def abstract(config=CONFIG, model_config=toy.FULL, dtype=jnp.bfloat16):
  return state_lib.abstract_variables(model_config, config, dtype, scan_layers=False)


def abstract_state(trainable, patterns):
  tx = optimizer.make_optimizer(OptimizerConfig(), 7, patterns)
  return jax.eval_shape(lambda t: state_lib.init_state(t, tx), trainable)


def test_split_and_join():
  variables = {'params': toy.base(dtype=jnp.bfloat16), 'lora': toy.factors()}
  trainable, frozen = state_lib.split(variables, ('lora/', 'params/layers/attn/v'))
  trained = dict(pytree.items(trainable))
  assert {n for n in trained if n.startswith('params')} == {'params/layers/attn/v/w'}
  assert {x.dtype for x in trained.values()} == {jnp.dtype('float32')}
  assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype('bfloat16')}
  joined = state_lib.join(trainable, frozen)
  variables['params']['layers']['attn']['v']['w'] = trained['params/layers/attn/v/w']
  toy.assert_equal(joined, variables)


def test_a_pattern_that_matches_no_leaf_says_what_paths_look_like():
  with pytest.raises(ValueError, match=r"trainable: 'layers/' matches.*lora/layer"):
    state_lib.split(abstract(), ('layers/',))


def test_one_pattern_of_several_that_matches_no_leaf_is_refused_too():
  """A misspelt kernel beside 'lora/' would silently stay frozen."""
  patterns = ('lora/', 'params/layer_1/attention/v')
  with pytest.raises(ValueError, match='attention/v'):
    state_lib.split(abstract(), patterns)


def test_state_holds_float32_moments_of_the_trainable_leaves_alone():
  trainable, _ = state_lib.split(abstract(), ('lora/',))
  state = abstract_state(trainable, ('lora/',))
  moments = [x for x in jax.tree.leaves(state.opt_state) if x.dtype != jnp.int32]
  assert {x.dtype for x in moments} == {jnp.dtype('float32')}
  assert pytree.num_params(moments) == 2 * pytree.num_params(trainable)
  assert state.step.shape == () and state.step.dtype == jnp.int32


class TestPublishedCounts:
  """Gemma 1 2B, rank 4, Keras's factorisation on q and v (from shapes)."""

  KERAS = LoraConfig(rank=4, targets='qv', factorization='keras')
  TOTAL = 2_507_536_384

  def counts(self, patterns):
    variables = abstract(self.KERAS, variants.get('gemma_2b'), jnp.float32)
    trainable, frozen = state_lib.split(variables, patterns)
    state = abstract_state(trainable, patterns)
    return tuple(pytree.num_params(x) for x in (trainable, frozen, state.opt_state))

  def test_every_adapter(self):
    trained, frozen, moments = self.counts(('lora/',))
    assert (trained, frozen) == (1_363_968, 2_506_172_416)
    assert trained + frozen == self.TOTAL
    assert moments == 2 * trained + 2

  @pytest.mark.parametrize('layer', [0, 17])
  def test_one_layers_value_kernel_with_its_adapter(self, layer):
    """What the tutorial's training summary showed."""
    # A path's end keeps layer_1 from layer_10 and onwards.
    path = f'layer_{layer}/attn/v/'
    trained, frozen, moments = self.counts((f'params/{path}', f'lora/{path}'))
    assert (trained, frozen, moments) == (533_504, 2_507_002_880, 1_067_010)
    assert trained + frozen + moments == 2_508_603_394
