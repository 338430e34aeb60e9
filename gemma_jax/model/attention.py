"""Grouped-query attention with segments, windows and a decode cache."""

from typing import NamedTuple, Protocol

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from gemma_jax.model import rope
from gemma_jax.model.config import ModelConfig
from gemma_jax.model.layers import Einsum, RMSNorm, softcap
from gemma_jax.model.layout import PROJECTION_EQUATIONS

MASK_VALUE = -(2.0**30)  # finite: a row without a visible key must not give NaN


@struct.dataclass
class Cache:
  """Keys and values of the tokens seen so far; all layers have one shape.

  Attributes:
    k: [L, B, S, K, H], after RoPE.
    v: [L, B, S, K, H].
    positions: int32 [B, S].
    segment_ids: int32 [B, S]; 0 marks slots that are empty or padding.
    index: int32 [], the next slot to write, the same for every row.
  """

  k: jax.Array
  v: jax.Array
  positions: jax.Array
  segment_ids: jax.Array
  index: jax.Array


def init_cache(config: ModelConfig, batch_size: int, length: int, dtype) -> Cache:
  """An empty cache for `length` tokens per row."""
  shape = (config.num_layers, batch_size, length, config.num_kv_heads, config.head_dim)
  slots = jnp.zeros((batch_size, length), jnp.int32)
  return Cache(
    k=jnp.zeros(shape, dtype),
    v=jnp.zeros(shape, dtype),
    positions=slots,
    segment_ids=slots,
    index=jnp.int32(0),
  )


class Context(NamedTuple):
  """What every layer's attention needs besides its input; shared by all.

  Attributes:
    global_rotation: sin, cos of the global layers, float32 [B, T, H/2].
    local_rotation: the same for the local layers.
    q_positions: int32 [B, T].
    q_segment_ids: int32 [B, T].
    k_positions: int32 [B, S].
    k_segment_ids: int32 [B, S].
    index: first cache slot to write, or None without a cache.
  """

  global_rotation: tuple[jax.Array, jax.Array]
  local_rotation: tuple[jax.Array, jax.Array]
  q_positions: jax.Array
  q_segment_ids: jax.Array
  k_positions: jax.Array
  k_segment_ids: jax.Array
  index: jax.Array | None


def visible(context: Context, window: int | jax.Array | None) -> jax.Array:
  """Which keys each query sees: bool [B, T, S].

  A key is visible if it is in the same segment (not 0), not later, and, in a local
  layer, fewer than `window` positions back.
  """
  q_pos, k_pos = context.q_positions[:, :, None], context.k_positions[:, None]
  q_seg = context.q_segment_ids[:, :, None]
  mask = (q_seg == context.k_segment_ids[:, None]) & (q_seg > 0)
  mask &= k_pos <= q_pos
  if window is not None:
    mask &= q_pos - k_pos < window
  return mask


def einsum_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, cap: float | None
) -> jax.Array:
  """softmax(q k) v, with all scores in memory.

  Args:
    q: [B, T, N, H], already scaled.
    k: [B, S, K, H].
    v: [B, S, K, H].
    mask: bool [B, T, S].
    cap: soft cap on the scores, or None.

  Returns:
    [B, T, N, H] in q's dtype; zeros for a query that sees no key.
  """
  B, T, N, H = q.shape
  K = k.shape[2]
  # Heads are grouped by the kv head they share. Scores keep the layout that a CPU's
  # product gives, groups after queries; another would copy all of them.
  q = q.reshape(B, T, K, N // K, H)
  scores = jnp.einsum('BTKGH,BSKH->BKTGS', q, k, preferred_element_type=jnp.float32)
  seen = mask[:, None, :, None]  # [B, 1, T, 1, S]
  scores = jnp.where(seen, softcap(scores, cap), MASK_VALUE)
  probs = jax.nn.softmax(scores, axis=-1)
  out = jnp.einsum('BKTGS,BSKH->BTKGH', probs.astype(v.dtype), v)
  out = out.reshape(B, T, N, H)
  sees_any = jnp.any(mask, axis=-1)[:, :, None, None]  # else the result is a mean of v
  return jnp.where(sees_any, out, jnp.zeros_like(out))


class Attend(Protocol):
  """softmax(q k) v over the keys that each query sees; `kernels` chooses one.

  q [B, T, N, H] is already scaled, k and v are [B, S, K, H]; `window` is a local
  layer's, or None; `cap` is the soft cap on the scores, or None. Returns
  [B, T, N, H], zeros for a query that sees no key. Every implementation equals
  `attend_by_einsum` for rows as `packing` makes them: a segment's tokens are
  adjacent, one position apart.
  """

  def __call__(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    context: Context,
    window: int | None,
    cap: float | None,
  ) -> jax.Array: ...


def attend_by_einsum(q, k, v, context, window, cap) -> jax.Array:
  """The `Attend` for any segments and positions; the reference for the others."""
  return einsum_attention(q, k, v, visible(context, window), cap)


class Attention(nn.Module):
  """Projections, q/k norm, RoPE, attention, output projection."""

  config: ModelConfig
  dropout: float = 0.0
  attend: Attend = attend_by_einsum
  plain_gradients: bool = False

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    is_local: bool | jax.Array,
    layer: int | jax.Array,
    context: Context,
    kv: tuple[jax.Array, jax.Array] | None,
  ):
    """Args: x [B, T, D]; kv the cache's k, v of all layers, or None.

    Returns:
      [B, T, D] and the updated kv.
    """
    config = self.config
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    D = config.embed_dim

    def project(name, shape):
      equation = PROJECTION_EQUATIONS[f'attn/{name}']
      return Einsum(equation, shape, self.dropout, self.plain_gradients, name=name)

    q = project('q', (N, D, H))(x)  # [B, T, N, H]
    k = project('k', (K, D, H))(x)  # [B, T, K, H]
    v = project('v', (K, D, H))(x)  # [B, T, K, H]
    if config.use_qk_norm:
      q = RMSNorm(config.norm_eps, name='q_norm')(q)
      k = RMSNorm(config.norm_eps, name='k_norm')(k)

    sin, cos = jax.tree.map(
      lambda a, b: _choose(is_local, a, b), context.local_rotation, context.global_rotation
    )
    query_scale = config.query_scale or H**-0.5
    q = rope.apply(q, sin, cos) * query_scale
    k = rope.apply(k, sin, cos)

    if kv is not None:  # write the new keys and values, attend to all slots
      assert context.index is not None  # a context with a cache says where to write
      start = (layer, 0, context.index, 0, 0)
      write = lambda old, new: jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), start)
      kv = write(kv[0], k), write(kv[1], v)
      k, v = (jax.lax.dynamic_index_in_dim(c, layer, keepdims=False) for c in kv)

    # The kernels are for whole rows; a cache is read by a few queries.
    kernel = self.attend if kv is None else attend_by_einsum

    def attend(window):
      return kernel(q, k, v, context, window, config.attention_softcap)

    if config.layer_is_local is None:
      y = attend(None)
    elif isinstance(is_local, bool):
      y = attend(config.window_size if is_local else None)
    elif kv is not None:  # the whole cache is read; only the mask differs
      y = attend(jnp.where(is_local, config.window_size or 0, config.max_positions))
    else:  # one compiled layer serves both kinds; only one branch runs
      y = jax.lax.cond(is_local, lambda: attend(config.window_size), lambda: attend(None))
    return project('o', (N, H, D))(y), kv


def _choose(flag: bool | jax.Array, yes: jax.Array, no: jax.Array):
  if isinstance(flag, bool):
    return yes if flag else no
  return jnp.where(flag, yes, no)
