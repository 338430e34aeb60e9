"""Trees of arrays by path: names, regex masks, splitting, counting.

A path joins the keys of nested dicts with '/':
'params/layers/attn/q/w', 'lora/layers/attn/q/lora_a'. Everything here works on
arrays and on `jax.ShapeDtypeStruct`s alike.
"""

from collections.abc import Callable, Iterable, Mapping
import math
import re
from typing import Any

import jax
import numpy as np
import optax

Tree = Any


def path_name(path: tuple[Any, ...]) -> str:
  """A key path of jax.tree_util as 'a/b/0'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def items(tree: Tree) -> list[tuple[str, Any]]:
  """(path, leaf) pairs in the tree's own order.

  >>> items({'a': {'b': 1, 'c': 2}})
  [('a/b', 1), ('a/c', 2)]
  """
  return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def map_with_name(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
  """`jax.tree.map` whose function takes the leaf's path first."""
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: fn(path_name(path), *leaves), tree, *rest
  )


def shapes(tree: Tree) -> Tree:
  """The tree as `jax.ShapeDtypeStruct`s."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def mask(tree: Tree, patterns: Iterable[str]) -> Tree:
  """Booleans: whether any of the patterns matches the start of a leaf's path.

  >>> mask({'lora': {'a': 1}, 'params': {'w': 2}}, ('lora/', 'params/mlp/up'))
  {'lora': {'a': True}, 'params': {'w': False}}
  """
  compiled = [re.compile(p) for p in patterns]
  return map_with_name(lambda name, _: any(p.match(name) for p in compiled), tree)


def partition(tree: Tree, selected: Tree) -> tuple[Tree, Tree]:
  """Splits a tree by a boolean mask of the same structure.

  Both parts keep the tree's structure; a leaf that went to the other part is
  replaced by `optax.MaskedNode()`, which has no leaves, so that gradients and
  optimizer states of a part hold only its own leaves.

  >>> partition({'a': 1, 'b': 2}, {'a': True, 'b': False})
  ({'a': 1, 'b': MaskedNode()}, {'a': MaskedNode(), 'b': 2})

  Returns:
    (leaves where the mask is True, leaves where it is False).
  """
  node = optax.MaskedNode()
  yes = jax.tree.map(lambda m, x: x if m else node, selected, tree)
  no = jax.tree.map(lambda m, x: node if m else x, selected, tree)
  return yes, no


def combine(first: Tree, second: Tree) -> Tree:
  """Undoes `partition`."""
  is_hole = lambda x: isinstance(x, optax.MaskedNode)
  return jax.tree.map(lambda a, b: b if is_hole(a) else a, first, second, is_leaf=is_hole)


def prune(tree: Tree) -> Tree:
  """Nested dicts without holes (`MaskedNode`) and without empty dicts.

  >>> prune({'a': 1, 'b': {'c': optax.MaskedNode()}})
  {'a': 1}
  """
  if not isinstance(tree, dict):
    return tree
  kept = {k: prune(v) for k, v in tree.items()}
  is_hole = lambda v: isinstance(v, optax.MaskedNode)
  is_empty = lambda v: isinstance(v, dict) and not v
  return {k: v for k, v in kept.items() if not is_hole(v) and not is_empty(v)}


def unflatten(leaves: Mapping[str, Any]) -> Tree:
  """Nested dicts by path; undoes `items`.

  >>> unflatten({'a/b': 1, 'a/c': 2})
  {'a': {'b': 1, 'c': 2}}
  """
  tree: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *parents, last = name.split('/')
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = leaf
  return tree


def num_params(tree: Tree) -> int:
  """Number of array elements."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def num_bytes(tree: Tree) -> int:
  """Bytes of all leaves in their own dtypes."""
  return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
