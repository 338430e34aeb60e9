"""Singular values of an adapter's update, and its best approximations.

dW = scale B A has the singular values of a small core, whatever the size of W:

    A = Q_A R_A,  B^T = Q_B R_B    (QR; Q has orthonormal columns)
    dW = Q_A (scale R_A R_B^T) Q_B^T

so the SVD U S V^T of the core [R, R] gives that of dW, which is never formed,
and the best approximation of rank r (Eckart and Young 1936) is its first r
triplets. NumPy in float64: factors are small. DoRA's magnitudes are not part of
dW: they scale the sum with the base.
"""

import dataclasses
from typing import Any

import numpy as np

from gemma_jax import pytree
from gemma_jax.config.lora import LoraConfig
from gemma_jax.lora import matrices
from gemma_jax.lora.lora import Lora
from gemma_jax.model import adapter, layout
from gemma_jax.model.config import ModelConfig


def singular_values(lora: Lora, config: ModelConfig) -> dict[str, np.ndarray]:
  """Singular values of dW, for every projection and layer.

  Args:
    lora: one adapter, scanned or unrolled, in either factorization.
    config: the base's architecture.

  Returns:
    'attn/q' → float64 [L, R], in descending order (R is N r where Keras's
    factorization gives each head its own factors).
  """
  values = {}
  for path, (a, b) in _matrices(lora, config).items():
    _, core, _ = _core(a, b, lora.config.scale)
    values[path] = np.linalg.svd(core, compute_uv=False)
  return values


def truncate(lora: Lora, config: ModelConfig, rank: int) -> Lora:
  """The best approximation of every dW at a given rank, scanned.

  Args:
    lora: one adapter, scanned or unrolled, in either factorization.
    config: the base's architecture.
    rank: the rank of the approximation.

  Returns:
    An adapter of the `matrix` factorization whose scale is 1; float32.

  Raises:
    ValueError: a DoRA adapter, whose magnitudes belong to its own dW.
  """
  if lora.config.dora:
    raise ValueError(
      'lora.dora: got True, expected False: magnitudes fit only their own dW. '
      'Merge it, or truncate plain LoRA.'
    )
  tree = {}
  sizes = layout.axis_sizes(config)
  for path, (a, b) in _matrices(lora, config).items():
    q_a, core, q_b = _core(a, b, lora.config.scale)
    u, s, vt = np.linalg.svd(core)
    root = np.sqrt(s[:, None, :rank])
    a = q_a @ (u[..., :rank] * root)  # [L, inputs, rank]
    b = np.swapaxes(q_b @ (np.swapaxes(vt, 1, 2)[..., :rank] * root), 1, 2)
    axes = adapter.factor_axes(layout.PROJECTION_EQUATIONS[path], 'matrix')
    a_shape, b_shape = ([sizes.get(c, rank) for c in x] for x in axes)
    for name, x, shape in (('lora_a', a, a_shape), ('lora_b', b, b_shape)):
      tree[f'layers/{path}/{name}'] = x.reshape(len(x), *shape).astype(np.float32)
  lora_config = LoraConfig(rank=rank, alpha=1.0, scale_rule='constant', targets=lora.config.targets)
  return dataclasses.replace(
    lora, factors=pytree.unflatten(tree), scale=np.float32(1), config=lora_config, trained_base={}
  )


def effective_rank(values: np.ndarray) -> np.ndarray:
  """exp of the entropy of the normalized values (Roy and Vetterli 2007).

  k equal values and zeros give k; one value gives 1; all zeros give 0.

  >>> effective_rank(np.array([[2, 2, 0], [1, 0, 0], [0, 0, 0]])).round(6).tolist()
  [2.0, 1.0, 0.0]

  Args:
    values: [..., R], non-negative.

  Returns:
    float64 [...].
  """
  total = values.sum(-1, keepdims=True)
  shares = values / np.where(total > 0, total, 1)
  logs = np.log(np.where(shares > 0, shares, 1))
  return np.where(total[..., 0] > 0, np.exp(-(shares * logs).sum(-1)), 0.0)


def input_directions(lora: Lora, config: ModelConfig) -> dict[str, np.ndarray]:
  """Singular vectors of dW on its input side: what an adapter reads.

  Returns:
    'attn/q' → float64 [L, inputs, R], orthonormal, strongest first.
  """
  directions = {}
  for path, (a, b) in _matrices(lora, config).items():
    q_a, core, _ = _core(a, b, lora.config.scale)
    directions[path] = q_a @ np.linalg.svd(core)[0]
  return directions


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
  """How much of the smaller of two subspaces lies in the other, in [0, 1].

  phi = |U^T V|_F^2 / min(r, s) (Hu et al. 2021, section 7.2, eq. 4).

  >>> x, y, z = np.eye(3).reshape(3, 3, 1)
  >>> float(similarity(np.hstack([x, y]), np.hstack([y, z])))
  0.5

  Args:
    first: orthonormal columns [..., inputs, r].
    second: orthonormal columns [..., inputs, s].

  Returns:
    float64 [...].
  """
  overlap = np.swapaxes(first, -1, -2) @ second
  return (overlap**2).sum((-1, -2)) / min(overlap.shape[-2:])


def _core(a: np.ndarray, b: np.ndarray, scale: float) -> tuple[Any, ...]:
  """(Q_A, scale R_A R_B^T, Q_B) of A [L, inputs, R] and B [L, R, outputs]."""
  q_a, r_a = np.linalg.qr(a)
  q_b, r_b = np.linalg.qr(np.swapaxes(b, 1, 2))
  return q_a, scale * r_a @ np.swapaxes(r_b, 1, 2), q_b


def _matrices(lora, config):
  """Path → A [L, inputs, R] and B [L, R, outputs], float64."""
  factors = lora.factors
  if 'layers' not in factors:
    factors = layout.stack_layers(factors)
  if lora.config.factorization == 'keras':
    factors = matrices.as_matrix(factors, lora.config, config)
  flat = dict(pytree.items(factors))
  pairs = {}
  for name in flat:
    if not name.endswith('/lora_a'):
      continue
    module = name.removesuffix('/lora_a')
    a = np.asarray(flat[name], np.float64)
    b = np.asarray(flat[f'{module}/lora_b'], np.float64)
    pairs[module.removeprefix('layers/')] = (
      a.reshape(len(a), -1, a.shape[-1]),
      b.reshape(len(b), b.shape[1], -1),
    )
  return pairs
