"""Attention on an NVIDIA GPU: cuDNN's fused kernel, through `jax.nn`."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from gemma_jax.model.attention import Context, visible
from gemma_jax.model.config import ModelConfig

# cuDNN's flash attention takes half-precision inputs and heads of up to 128
# elements, or 256 from Hopper (compute capability 9.0) on.
_MAX_HEAD_DIM, _MAX_HEAD_DIM_HOPPER = 128, 256


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  context: Context,
  window: int | None,
  cap: float | None,
  implementation: Literal['cudnn', 'xla'] = 'cudnn',
) -> jax.Array:
  """An `attention.Attend`: q [B, T, N, H], k and v [B, T, K, H].

  Segments are passed as a mask [B, 1, T, S], one for all heads; causality and the
  window are also passed as arguments, so that blocks they hide are skipped. These
  apply by index within a row, as in `splash`.
  """
  del cap  # `unsupported_reason` makes sure that there is none
  mask = visible(context, window)
  out = jax.nn.dot_product_attention(
    q,
    k,
    v,
    mask=mask[:, None],
    scale=1.0,
    is_causal=True,
    local_window_size=None if window is None else (window - 1, 0),
    implementation=implementation,
  )
  # A row without a visible key gives the mean of v there.
  seen = jnp.any(mask, axis=-1)[:, :, None, None]
  return jnp.where(seen, out, jnp.zeros_like(out))


def unsupported_reason(config: ModelConfig, dtype: Any, device: Any) -> str | None:
  """Why cuDNN cannot compute a model's attention, or None if it can.

  Args:
    config: architecture.
    dtype: of the activations.
    device: one of the mesh.
  """
  if device.platform != 'gpu':
    return f'it runs on a GPU, not on {device.platform}'
  if config.attention_softcap is not None:
    return 'it has no soft cap, which this model needs'
  if jnp.dtype(dtype).itemsize != 2:
    return f'it takes bfloat16 activations, not {jnp.dtype(dtype).name}'
  capability = float(getattr(device, 'compute_capability', 0))
  largest = _MAX_HEAD_DIM_HOPPER if capability >= 9 else _MAX_HEAD_DIM
  if config.head_dim > largest or config.head_dim % 8:
    return (
      f'it takes head_dim up to {largest} in eights on {device.device_kind}, not {config.head_dim}'
    )
  return None
