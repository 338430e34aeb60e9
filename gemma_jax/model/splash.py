"""Attention on a TPU: the Pallas "splash" kernel of JAX, on a sharded mesh.

The kernel loops over blocks of scores, keeps a running softmax, skips blocks that
the causal or local mask hides, and computes the gradient the same way, so that no
[T, S] array is ever held. It masks by index within a row, while
`attention.visible` masks by position: the two agree as long as a segment's tokens
are adjacent, one position apart, as packing makes them.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as pallas_splash
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from gemma_jax.model.attention import Context

# These take bfloat16 matrix products from XLA, but not from a Pallas kernel: libtpu
# 0.0.42 says "Unsupported matmul RHS type".
_FLOAT32_ONLY = ('TPU v2', 'TPU v3')
_LANES = 128  # of a TPU's vector unit: rows are padded to a multiple
_MAX_BLOCK = 512  # scores of a block, 512 x 512 float32: 1 MiB of VMEM


@dataclasses.dataclass(frozen=True)
class Splash:
  """An `attention.Attend`; every device runs the kernel on its own part.

  A custom kernel is opaque to XLA's partitioner, hence `jax.shard_map`.

  Attributes:
    mesh: the devices.
    batch_axes: mesh axes that the rows are split over.
    head_axis: mesh axis that the heads are split over.
    interpret: run it step by step on a CPU: correct, but far too slow for anything
      but tests.
  """

  mesh: Mesh
  batch_axes: tuple[str, ...]
  head_axis: str
  interpret: bool = False

  def __call__(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    context: Context,
    window: int | None,
    cap: float | None,
  ) -> jax.Array:
    """q [B, T, N, H], k and v [B, T, K, H] → [B, T, N, H]."""
    N, K = q.shape[2], k.shape[2]
    shards = self.mesh.shape[self.head_axis]
    if K > 1 and K % shards:  # a shard's queries may need any of the kv heads
      k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))

    def spec(x):
      heads = self.head_axis if x.shape[2] % shards == 0 else None
      return PartitionSpec(self.batch_axes, None, heads)

    attend = jax.shard_map(
      functools.partial(_attend_locally, window=window, cap=cap, interpret=self.interpret),
      mesh=self.mesh,
      in_specs=(spec(q), spec(k), spec(v), PartitionSpec(self.batch_axes)),
      out_specs=spec(q),
      check_vma=False,  # pallas_call does not say over which axes its result varies
    )
    out = attend(q, k, v, context.q_segment_ids)
    # Padding is a segment for the kernel; its queries must give zeros.
    is_real = (context.q_segment_ids > 0)[:, :, None, None]
    return jnp.where(is_real, out, jnp.zeros_like(out))


def unsupported_reason(dtype: Any, device: Any) -> str | None:
  """Why the kernel cannot run, or None if it can.

  Args:
    dtype: of the activations.
    device: one of the mesh.
  """
  if device.platform == 'gpu':
    return 'it runs on a TPU (and, interpreted, on a CPU)'
  if device.device_kind in _FLOAT32_ONLY and jnp.dtype(dtype) != jnp.float32:
    return f'it takes float32 activations on {device.device_kind}, not {jnp.dtype(dtype).name}'
  return None


def _attend_locally(q, k, v, segment_ids, *, window, cap, interpret):
  """One device's rows and heads, padded to whole blocks."""
  T, N = q.shape[1:3]
  length = T + -T % _LANES
  block = max(b for b in range(_LANES, _MAX_BLOCK + 1, _LANES) if length % b == 0)
  shape = (length, length)
  if window is None:
    mask = pallas_splash.CausalMask(shape)
  else:
    mask = pallas_splash.LocalMask(shape, (window - 1, 0), offset=0)
  kernel = pallas_splash.make_splash_mha(
    pallas_splash.MultiHeadMask([mask] * N),
    block_sizes=pallas_splash.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=cap,
    interpret=interpret,
  )
  pad = ((0, 0), (0, length - T), (0, 0), (0, 0))
  q, k, v = (jnp.pad(x, pad).swapaxes(1, 2) for x in (q, k, v))
  segment_ids = jnp.pad(segment_ids, pad[:2])  # 0, as padding has
  segments = pallas_splash.SegmentIds(q=segment_ids, kv=segment_ids)
  out = jax.vmap(kernel)(q, k, v, segments)  # [B, N, length, H]
  assert isinstance(out, jax.Array)  # residuals, a pair's second, were not asked for
  return out.swapaxes(1, 2)[:, :T]
