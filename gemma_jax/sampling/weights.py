"""A base as decoding reads it: narrow, with each output's weights contiguous.

    base = weights.prepare({'params': params}, 'int8')
    sampler.generate(base, prompts, SamplingConfig())

Decoding a token reads every weight once and does little with it, so it takes as
long as reading the bytes. bfloat16 halves them; int8, with a float32 scale for
each output channel, quarters them. Sums stay float32.

    params  layers/mlp/up/w [L, D, F]    →    rows  layers/mlp/up/w [L, F, D]
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from gemma_jax import pytree
from gemma_jax.lora.lora import Lora
from gemma_jax.model import layout
from gemma_jax.model import rows as rows_lib
from gemma_jax.model.rows import Rows

WEIGHTS = ('auto', 'float32', 'bfloat16', 'int8')
_EMBEDDING = 'embedder/input_embedding'


def load_dtype(weights: str) -> str:
  """The dtype in which to load a base before `prepare`."""
  return 'auto' if weights == 'int8' else weights


def for_adapters(
  params: pytree.Tree, adapters: Mapping[str, Lora], weights: str = 'auto'
) -> dict[str, Any]:
  """Variables of each adapter by its name; they share as much as possible.

  Args:
    params: the base.
    adapters: by name, of one shape (`formats.adapter.load_adapters`).
    weights: as in `prepare`.
  """
  base = prepare({'params': params}, weights)
  prepared = {}
  for name, adapter in adapters.items():
    variables = adapter.variables(params)
    if adapter.trained_base:
      prepared[name] = prepare(variables, weights)
    else:
      prepared[name] = {**base, **{k: x for k, x in variables.items() if k != 'params'}}
  return prepared


def prepare(variables: Any, weights: str = 'auto') -> dict[str, Any]:
  """Converts a model's variables for decoding.

  Args:
    variables: {'params'} or {'params', 'lora'}, scanned or unrolled.
    weights: 'int8' quantizes the kernels and the embedding; else they keep the
      dtype they were loaded in (`load_dtype`).

  Returns:
    `variables` with kernels and embedding moved from `params` to `rows`, where
    their leaves are `Rows`; norm scales stay.

  Raises:
    ValueError: unknown `weights`.
  """
  if weights not in WEIGHTS:
    raise ValueError(f'weights: got {weights!r}, expected one of {", ".join(WEIGHTS)}.')
  params, rows = {}, {}
  for name, leaf in pytree.items(variables['params']):
    num_summed = 0
    if name == _EMBEDDING:
      num_summed = 1
    elif name.endswith('/w'):
      equation = layout.PROJECTION_EQUATIONS[name.split('/', 1)[1][:-2]]
      kernel = equation.split('->')[0].split(',')[1]
      order = [kernel.index(c) - len(kernel) for c in rows_lib.axes(equation)]
      num_summed = sum(c in equation.split(',')[0] for c in kernel)
      leaf = jnp.moveaxis(leaf, order, range(-len(kernel), 0))
    if not num_summed:
      params[name] = leaf
    elif weights == 'int8':
      rows[name] = quantize(leaf, num_summed)
    else:
      rows[name] = Rows(leaf)
  return {**variables, 'params': pytree.unflatten(params), 'rows': pytree.unflatten(rows)}


@functools.partial(jax.jit, static_argnames='num_summed')
def quantize(values: jax.Array, num_summed: int) -> Rows:
  """Rounds each row to the nearest of 255 evenly spaced values.

  The largest weight of a row is 127 times its scale, zeros stay zeros, and no
  weight moves by more than half the scale.

  Args:
    values: [outputs ..., summed axes ...].
    num_summed: how many axes are summed over.
  """
  axis = tuple(range(-num_summed, 0))
  values = values.astype(jnp.float32)
  scale = jnp.max(jnp.abs(values), axis=axis, keepdims=True) / 127.0
  values = jnp.round(values / jnp.where(scale > 0, scale, 1.0))
  return Rows(values.astype(jnp.int8), jnp.squeeze(scale, axis))
