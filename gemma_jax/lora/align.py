"""Several adapters of one base: aligned, stacked, taken apart.

Adapters of different rank, scale and targets become trees of equal
shapes: ranks are padded with zero columns, missing targets filled with zeros.
The base itself is then the all-zero adapter, whose update is exactly 0.
"""

from collections.abc import Sequence
import dataclasses
import re
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax import pytree
from gemma_jax.lora import factors as factors_lib

if TYPE_CHECKING:
  from gemma_jax.lora.lora import Lora


def align(loras: Sequence['Lora']) -> list['Lora']:
  """Pads adapters with zeros to one structure and one rank per target.

      align([Lora({}, ...), Lora({'layers': {'attn': {'q': {'lora_a': [L, D, 3], ...}}}}, ...)])

  gives the first adapter zeros in the second's shapes.

  Args:
    loras: all scanned or all unrolled, factorization `matrix` (as read from
      PEFT folders).

  Returns:
    Adapters that compute what the given ones do.
  """
  flat = [dict(pytree.items(each.factors)) for each in loras]
  shapes: dict[str, tuple[int, ...]] = {}
  for leaves in flat:
    for name, x in leaves.items():
      shape: tuple[int, ...] = x.shape
      shapes[name] = tuple(map(max, shapes.get(name, shape), shape))

  def fit(x, shape):
    if x is None:
      return jnp.zeros(shape, jnp.float32)
    return jnp.pad(x, [(0, n - m) for m, n in zip(x.shape, shape, strict=True)])

  return [
    dataclasses.replace(
      each, factors=pytree.unflatten({n: fit(leaves.get(n), s) for n, s in shapes.items()})
    )
    for each, leaves in zip(loras, flat, strict=True)
  ]


def stack(loras: Sequence['Lora']) -> 'Lora':
  """Stacks K adapters into one `Lora` whose arrays are [K, ...].

  Ranks are padded with zeros, which is exact in training too. Where a column of
  A and its row of B are zero, so are their gradients (each is a product with the
  other), hence their moments, updates, decay and share of the clipped norm:

      rank 2 among 4    A [a1 a2 0 0]    B [b1 b2 0 0]^T    A B = a1 b1 + a2 b2

  Raises:
    ValueError: no adapters, one with per-layer ranks or a trained base, or a mix
      of factorizations or forms (scanned or not).
  """
  if not loras:
    raise ValueError('lora: got no adapter to stack, expected at least one.')
  for each in loras:
    if each.config.ranks or each.trained_base:
      raise ValueError(
        'lora: got an adapter with lora.ranks or trained leaves of the base, expected adapters '
        'with a single rank and nothing else; train this one alone.'
      )
  forms = {(each.config.factorization, 'layers' in each.factors) for each in loras}
  if len(forms) > 1:
    raise ValueError(
      'lora: got a mix of factorizations or forms (scanned or not) to stack, expected one of each.'
    )
  aligned = align(loras)
  shared = lambda values: values[0] if all(x == values[0] for x in values) else None
  return dataclasses.replace(
    aligned[0],
    factors=jax.tree.map(lambda *leaves: jnp.stack(leaves), *(each.factors for each in aligned)),
    scale=jnp.asarray([each.scale for each in aligned], jnp.float32),
    config=tuple(each.config for each in loras),
    reference=shared([each.reference for each in loras]) or '',
    trained_with=shared([each.trained_with for each in loras]),
  )


def member(tree: pytree.Tree, index: int) -> pytree.Tree:
  """One adapter's leaves, out of [K, ...]."""
  return jax.tree.map(lambda x: x[index], tree)


def cut(factors: pytree.Tree, rank: int) -> pytree.Tree:
  """The first `rank` columns of A and rows of B: factors without padding."""

  def leaf(name, x):
    axis = factors_lib.rank_axis(name, x)
    return x if axis is None else np.take(x, range(rank), axis)

  return pytree.map_with_name(leaf, factors)


def replace_leaves(params: Any, leaves: Any) -> Any:
  """A base with some leaves replaced, each cast to the old leaf's dtype.

  Either tree may be scanned or unrolled: `layer_3/attn/v/w` goes to index 3 of
  a scanned leaf, and a scanned leaf to every layer of an unrolled base.

  Raises:
    ValueError: a leaf that the base does not have, or has in another shape.
  """
  if not leaves:
    return params
  flat = dict(pytree.items(params))
  for name, leaf in pytree.items(leaves):
    for target, index, value in _destinations(name, leaf, flat):
      old = flat[target]
      shape = old.shape if index is None else old.shape[1:]
      if value.shape != shape:
        raise ValueError(
          f'trained base leaf {name}: got shape {value.shape}, expected '
          f'{shape}; it belongs to another architecture.'
        )
      value = jnp.asarray(value, old.dtype)
      flat[target] = value if index is None else old.at[index].set(value)
  return pytree.unflatten(flat)


def _destinations(name, leaf, flat):
  """Where a leaf goes: (path, index along L or None, value)."""
  if name in flat:
    return [(name, None, leaf)]
  one_layer = re.fullmatch(r'layer_(\d+)/(.*)', name)
  if one_layer:
    index, stacked = int(one_layer[1]), f'layers/{one_layer[2]}'
    if stacked in flat and index < len(flat[stacked]):
      return [(stacked, index, leaf)]
  rest = name.removeprefix('layers/')
  num_layers = sum(n.split('/', 1)[1:] == [rest] for n in flat)
  if rest != name and len(leaf) == num_layers:
    return [(f'layer_{i}/{rest}', None, x) for i, x in enumerate(leaf)]
  raise ValueError(
    f'trained base leaf {name}: got a path that this base does not have; it '
    'belongs to another architecture.'
  )
