"""The table of the base's leaves against the model that it describes."""

import jax
import jax.numpy as jnp
import pytest

from gemma_jax import pytree
from gemma_jax.model import layout
from gemma_jax.model.transformer import Transformer
from tests import toy


@pytest.mark.parametrize('scan_layers', [True, False])
@pytest.mark.parametrize('config', toy.CONFIGS.values(), ids=toy.CONFIGS)
def test_table_is_the_tree_that_the_model_makes(config, scan_layers):
  model = Transformer(config, scan_layers=scan_layers)
  made = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 3), jnp.int32))
  assert dict(pytree.items(made['params'])) == dict(
    pytree.items(layout.abstract_params(config, scan_layers=scan_layers))
  )


def test_axes_of_one_leaf_are_those_of_its_equation():
  axes = layout.param_axes(toy.FULL)
  assert axes['layers/attn/k/w'] == 'LKDH'
  assert axes['layers/mlp/down/w'] == 'LFD'
  assert axes['embedder/input_embedding'] == 'VD'


def test_stack_undoes_unstack():
  tree = toy.base(toy.FULL)
  unrolled = layout.unstack_layers(tree)
  assert sorted(unrolled) == ['embedder', 'final_norm', 'layer_0', 'layer_1', 'layer_2']
  toy.assert_equal(layout.stack_layers(unrolled), tree)


def test_layers_are_stacked_by_number_not_by_name():
  tree = {f'layer_{i}': {'w': jnp.float32(i)} for i in (10, 9, 2, 1, 0)}
  tree |= {f'layer_{i}': {'w': jnp.float32(i)} for i in range(3, 9)}
  assert layout.stack_layers(tree)['layers']['w'].tolist() == list(range(11))
