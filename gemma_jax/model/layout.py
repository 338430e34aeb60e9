"""The base's parameter tree, as one table of axis letters.

Shapes, shardings, LoRA factors and the file readers all follow from it. The
letters are those of `gemma_jax.model`: N query heads, K kv heads, D embed dim,
H head dim, F hidden dim, V vocabulary, L layers. Two forms of the same tree:

    scanned    layers/attn/q/w      [L, N, D, H]    one leaf for all layers
    unrolled   layer_0/attn/q/w     [N, D, H]       a leaf for each layer

Nothing here holds a weight: leaves are `jax.ShapeDtypeStruct`.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax import pytree
from gemma_jax.model.config import ModelConfig

# The seven projections of a layer: the path of the kernel, and the equation that
# applies it. A LoRA target is a name in this table.
PROJECTION_EQUATIONS = {
  'attn/q': 'BTD,NDH->BTNH',
  'attn/k': 'BTD,KDH->BTKH',
  'attn/v': 'BTD,KDH->BTKH',
  'attn/o': 'BTNH,NHD->BTD',
  'mlp/gate': 'BTD,DF->BTF',
  'mlp/up': 'BTD,DF->BTF',
  'mlp/down': 'BTF,FD->BTD',
}


def axis_sizes(config: ModelConfig) -> dict[str, int]:
  """Letter → size."""
  return {
    'V': config.vocab_size,
    'D': config.embed_dim,
    'F': config.hidden_dim,
    'N': config.num_heads,
    'K': config.num_kv_heads,
    'H': config.head_dim,
    'L': config.num_layers,
  }


def layer_axes(config: ModelConfig) -> dict[str, str]:
  """Axis letters of every leaf of one layer, by its path in the layer."""
  axes = {
    f'{name}/w': equation.split(',')[1].split('->')[0]
    for name, equation in PROJECTION_EQUATIONS.items()
  }
  axes['pre_attention_norm/scale'] = 'D'
  axes['pre_ffw_norm/scale'] = 'D'
  if config.use_qk_norm:
    axes['attn/q_norm/scale'] = 'H'
    axes['attn/k_norm/scale'] = 'H'
  if config.use_post_norms:
    axes['post_attention_norm/scale'] = 'D'
    axes['post_ffw_norm/scale'] = 'D'
  return axes


def projection_axes(path: str) -> tuple[str, str] | None:
  """Axis letters of a projection's outputs and inputs; None for other leaves.

  >>> projection_axes('layer_3/attn/q/w'), projection_axes('layers/attn/o/w')
  (('NH', 'D'), ('D', 'NH'))
  """
  match = re.fullmatch(r'(?:layer_\d+|layers)/((?:attn|mlp)/\w+)/w', path)
  if not match:
    return None
  operands, result = PROJECTION_EQUATIONS[match[1]].split('->')
  inputs, _ = operands.split(',')
  return result.removeprefix('BT'), inputs.removeprefix('BT')


def param_axes(config: ModelConfig, scan_layers: bool = True) -> dict[str, str]:
  """Axis letters of every leaf of the base, by path."""
  top = {'embedder/input_embedding': 'VD', 'final_norm/scale': 'D'}
  return top | in_layers(layer_axes(config), config, scan_layers)


def in_layers(axes: dict[str, str], config: ModelConfig, scan_layers: bool) -> dict[str, str]:
  """Axis letters of one layer's leaves → those of all layers' leaves."""
  if scan_layers:
    return {f'layers/{name}': 'L' + letters for name, letters in axes.items()}
  return {
    f'layer_{i}/{name}': letters for name, letters in axes.items() for i in range(config.num_layers)
  }


def abstract_params(
  config: ModelConfig, dtype: Any = jnp.float32, scan_layers: bool = True
) -> pytree.Tree:
  """The base's tree of `jax.ShapeDtypeStruct`, nested dicts."""
  sizes = axis_sizes(config)
  return pytree.unflatten(
    {
      name: jax.ShapeDtypeStruct(tuple(sizes[c] for c in letters), dtype)
      for name, letters in param_axes(config, scan_layers).items()
    }
  )


def stack_layers(tree: pytree.Tree) -> pytree.Tree:
  """layer_0 ... layer_{L-1} → layers, stacked along a new first axis."""
  numbered = {int(m[1]): key for key in tree if (m := re.fullmatch(r'layer_(\d+)', key))}
  rest = {k: v for k, v in tree.items() if k not in numbered.values()}
  layers = [tree[numbered[i]] for i in range(len(numbered))]
  xp = np if isinstance(jax.tree.leaves(layers)[0], np.ndarray) else jnp
  return {**rest, 'layers': jax.tree.map(lambda *x: xp.stack(x), *layers)}


def unstack_layers(tree: pytree.Tree) -> pytree.Tree:
  """layers → layer_0 ... layer_{L-1}; undoes `stack_layers`."""
  rest = {k: v for k, v in tree.items() if k != 'layers'}
  num_layers = jax.tree.leaves(tree['layers'])[0].shape[0]
  for i in range(num_layers):
    rest[f'layer_{i}'] = jax.tree.map(lambda x, i=i: x[i], tree['layers'])
  return rest
