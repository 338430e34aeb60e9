"""An adapter's factors as PEFT's matrices A [r, inputs] and B [outputs, r]."""

import jax
import numpy as np

from gemma_jax import pytree
from gemma_jax.config.train import LoraConfig
from gemma_jax.model import layout
from gemma_jax.model.config import ModelConfig

# Projections whose outputs have a heads axis: the factorizations differ there.
_PER_HEAD = ('attn/q', 'attn/k', 'attn/v')


def factor_shapes(
  name: str, config: ModelConfig, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Shapes of one layer's lora_a and lora_b in the factorization `matrix`.

  'attn/q'    [D, r], [r, N, H]
  'attn/o'    [N, H, r], [r, D]
  """
  axes = layout.projection_axes(f'layers/{name}/w')
  assert axes is not None  # only projections have factors
  outputs, inputs = axes
  sizes = layout.axis_sizes(config)
  return ((*(sizes[c] for c in inputs), rank), (rank, *(sizes[c] for c in outputs)))


def matrices(
  name: str, a: np.ndarray, b: np.ndarray, lora_config: LoraConfig
) -> tuple[np.ndarray, np.ndarray]:
  """One layer's factors as PEFT has them: A [r, inputs], B [outputs, r].

  Args:
    name: the projection, e.g. 'attn/q'.
    a: lora_a of one layer, in the factorization of `lora_config`.
    b: lora_b of that layer.
    lora_config: gives the factorization; for `keras`, r is N times its rank.
  """
  if lora_config.factorization == 'keras' and name in _PER_HEAD:
    return _keras_matrices(a, b)
  rank = a.shape[-1]
  return a.reshape(-1, rank).T, b.reshape(rank, -1).T


def as_matrix(
  factors: pytree.Tree, lora_config: LoraConfig, model_config: ModelConfig
) -> pytree.Tree:
  """The same adapter in the factorization `matrix`, with the same scale.

  `keras` factors of q, k and v get rank N r (K r); others are unchanged.

  Args:
    factors: scanned tree in the factorization of `lora_config`.
    lora_config: gives the factorization.
    model_config: the base's architecture.
  """
  leaves = dict(pytree.items(jax.device_get(factors)))
  for path in [path for path in leaves if path.endswith('/lora_a')]:
    module = path.removesuffix('/lora_a')
    name = module.removeprefix('layers/')
    pairs = [
      matrices(name, a, b, lora_config)
      for a, b in zip(leaves[path], leaves[f'{module}/lora_b'], strict=True)
    ]
    a_shape, b_shape = factor_shapes(name, model_config, len(pairs[0][0]))
    leaves[path] = np.stack([a.T.reshape(a_shape) for a, _ in pairs])
    leaves[f'{module}/lora_b'] = np.stack([b.T.reshape(b_shape) for _, b in pairs])
  return pytree.unflatten(leaves)


def _keras_matrices(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Keras's factors as matrices with the same product.

      A [N, D, r], B [r, H] → [N r, D], [N H, N r]

  Head n's update A[n] B needs r rows of its own; B is repeated N times
  along the diagonal.
  """
  num_heads, embed_dim, rank = a.shape
  head_dim = b.shape[1]
  rows = a.transpose(0, 2, 1).reshape(num_heads * rank, embed_dim)
  blocks = np.zeros((num_heads, head_dim, num_heads, rank), b.dtype)
  for n in range(num_heads):
    blocks[n, :, n] = b.T
  return rows, blocks.reshape(num_heads * head_dim, num_heads * rank)
