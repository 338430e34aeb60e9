"""Paths, masks, splitting and counting of trees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma_jax import pytree
from tests import toy

TREE = {
  'params': {
    'layer_1': {'attn': {'v': {'w': np.ones((3, 5), np.float32)}}},
    'layer_2': {'attn': {'v': {'w': np.ones((7,), jnp.bfloat16)}}},
  },
  'lora': {'layer_1': {'attn': {'v': {'lora_a': np.ones((2, 11), np.int8)}}}},
}
NAMES = ['lora/layer_1/attn/v/lora_a', 'params/layer_1/attn/v/w', 'params/layer_2/attn/v/w']


def test_items_names_every_leaf_and_unflatten_undoes_it():
  items = pytree.items(TREE)
  assert [name for name, _ in items] == NAMES
  toy.assert_equal(pytree.unflatten(dict(items)), TREE)


def test_names_join_all_kinds_of_keys():
  state = optax.adam(1.0).init({'a': jnp.zeros(2)})
  names = [name for name, _ in pytree.items(({'b': [1, 2]}, state[0]))]
  assert names == ['0/b/0', '0/b/1', '1/count', '1/mu/a', '1/nu/a']


@pytest.mark.parametrize(
  ('patterns', 'expected'),
  [
    (('lora/',), [True, False, False]),
    (('params/layer_1/attn/v',), [False, True, False]),
    (('lora/', r'params/layer_\d/attn'), [True, True, True]),
    (('attn',), [False, False, False]),  # at the path's start, not within
    ((), [False, False, False]),
  ],
)
def test_mask_matches_paths_from_their_start(patterns, expected):
  assert jax.tree.leaves(pytree.mask(TREE, patterns)) == expected


def test_partition_holds_each_leaf_on_one_side_and_combine_undoes_it():
  mask = pytree.mask(TREE, ('lora/', 'params/layer_2'))
  yes, no = pytree.partition(TREE, mask)
  assert [n for n, _ in pytree.items(yes)] == [NAMES[0], NAMES[2]]
  assert [n for n, _ in pytree.items(no)] == [NAMES[1]]
  toy.assert_equal(pytree.combine(yes, no), TREE)
  toy.assert_equal(pytree.combine(no, yes), TREE)


def test_prune_leaves_neither_holes_nor_empty_dicts():
  _, no = pytree.partition(TREE, pytree.mask(TREE, ('lora/', 'params/layer_2')))
  assert pytree.prune(no) == {'params': {'layer_1': TREE['params']['layer_1']}}


def test_counts_of_arrays_and_of_shapes_agree():
  abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, TREE))
  for tree in (TREE, abstract):
    assert pytree.num_params(tree) == 15 + 7 + 22
    assert pytree.num_bytes(tree) == 15 * 4 + 7 * 2 + 22 * 1
