"""How much arithmetic a LoRA step needs, and how much the machine can do."""

import math
import time

import numpy as np

from gemma_jax.model import layout
from gemma_jax.model.config import ModelConfig


def train_flops(config: ModelConfig, rows: int, length: int, supervised: int) -> float:
  """Floating-point operations that one update of full rows cannot do without.

  A product of n tokens with a kernel of P parameters takes 2 n P operations. The
  kernels are frozen, so each has 2 products: forward, and backward to the
  activations. The loss is the same with the embedding, for the supervised tokens.
  Attention has two products of each token with the keys it sees, L N H wide, and
  twice that backward. Recomputation to save memory does not count, nor do the
  adapter (0.1 %) and norms.

  Args:
    config: the architecture.
    rows: B.
    length: T; each row is one document.
    supervised: tokens in the loss.
  """
  sizes = layout.axis_sizes(config)
  kernels = sum(
    math.prod(sizes[c] for c in axes)
    for name, axes in layout.layer_axes(config).items()
    if name.endswith('/w')
  )
  tokens = rows * length
  products = 2 * 2 * tokens * kernels * config.num_layers
  loss = 2 * 2 * supervised * config.vocab_size * config.embed_dim
  pattern = config.layer_is_local or (False,) * config.num_layers
  seen = sum(
    sum(min(i + 1, (config.window_size or length) if is_local else length) for i in range(length))
    for is_local in pattern
  )
  width = config.num_heads * config.head_dim
  attention = 3 * 2 * 2 * rows * seen * width
  return float(products + loss + attention)


def gemm_rate(seconds: float = 2.0) -> float:
  """The machine's float32 rate in FLOP/s: the best of a large NumPy product.

  NumPy calls OpenBLAS, the fastest library measured here, so that a share of
  this rate is not flattering.
  """
  n = 2048
  rng = np.random.default_rng(0)
  a, b = (rng.standard_normal((n, n), np.float32) for _ in range(2))
  best, end = math.inf, time.perf_counter() + seconds
  while time.perf_counter() < end:
    started = time.perf_counter()
    np.matmul(a, b)
    best = min(best, time.perf_counter() - started)
  return 2 * n**3 / best
