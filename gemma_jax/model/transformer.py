"""The decoder: embedding, L layers, final norm; hidden states out.

Layers run in one `nn.scan` under `nn.remat` (one compiled layer), or unrolled
with `scan_layers=False`, which gives each layer its own path for reading,
debugging and masks that name one layer. Features are switched by the fields of
`ModelConfig`, never by a model's name.
"""

import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from gemma_jax.model import rope
from gemma_jax.model.attention import Attend, Attention, Cache, Context, attend_by_einsum
from gemma_jax.model.config import ModelConfig
from gemma_jax.model.layers import Einsum, Embedder, RMSNorm, softcap
from gemma_jax.model.layout import PROJECTION_EQUATIONS

# What a layer keeps of its forward pass, the rest being recomputed for the
# backward pass: only its input, or also the results of its products with weights
# (not the attention scores, which grow with T^2), or everything.
REMAT = {
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'none': None,
}


class Mlp(nn.Module):
  """GeGLU: down(gelu(gate x) * up x), GELU by its tanh approximation."""

  config: ModelConfig
  dropout: float = 0.0
  plain_gradients: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    D, F = self.config.embed_dim, self.config.hidden_dim

    def project(name, shape):
      equation = PROJECTION_EQUATIONS[f'mlp/{name}']
      return Einsum(equation, shape, self.dropout, self.plain_gradients, name=name)

    gate = jax.nn.gelu(project('gate', (D, F))(x), approximate=True)
    return project('down', (F, D))(gate * project('up', (D, F))(x))


class Layer(nn.Module):
  """Pre-norm attention and MLP, each with an optional post-norm."""

  config: ModelConfig
  dropout: float = 0.0
  hidden_sharding: Any = None
  attend: Attend = attend_by_einsum
  plain_gradients: bool = False

  @nn.compact
  def __call__(self, carry, is_local, layer, context: Context):
    x, kv = carry
    norm = lambda name: RMSNorm(self.config.norm_eps, name=name)
    y = norm('pre_attention_norm')(x)
    attention = Attention(self.config, self.dropout, self.attend, self.plain_gradients, name='attn')
    y, kv = attention(y, is_local, layer, context, kv)
    if self.config.use_post_norms:
      y = norm('post_attention_norm')(y)
    x = x + y
    y = norm('pre_ffw_norm')(x)
    y = Mlp(self.config, self.dropout, self.plain_gradients, name='mlp')(y)
    if self.config.use_post_norms:
      y = norm('post_ffw_norm')(y)
    x = _constrain(x + y, self.hidden_sharding)
    self.sow('intermediates', 'hidden', x)
    return (x, kv), None


class Transformer(nn.Module):
  """Token ids → hidden states; `logits` turns those into logits.

      model = Transformer(variants.get('gemma3_270m'))
      hidden = model.apply({'params': base}, tokens)              # the base
      hidden = model.apply(lora.variables(base), tokens)          # with an adapter

  Attributes:
    config: the architecture.
    dtype: of the activations; each layer's base weights are cast to it inside
      the scan.
    scan_layers: one scanned layer, or L unrolled ones.
    remat: what a layer keeps for the backward pass, a name of `REMAT`.
    dropout: rate on the adapters' inputs, active when a `dropout` key is given.
    hidden_sharding: sharding of [B, T, D] between layers, or None.
    attend: the attention of whole rows, from `kernels.choose`.
    plain_gradients: leave every gradient to JAX, so that `jax.jvp`,
      `jax.hessian` and Hessian-vector products work: no custom gradient of B,
      attention by einsum whatever `attend` is, and, in the steps, the loss from
      all logits. Values and gradients are the same up to rounding.
  """

  config: ModelConfig
  dtype: jax.typing.DTypeLike = jnp.float32
  scan_layers: bool = True
  remat: str = 'full'
  dropout: float = 0.0
  hidden_sharding: Any = None
  attend: Attend = attend_by_einsum
  plain_gradients: bool = False

  def setup(self):
    config = self.config
    self.embedder = Embedder(config.vocab_size, config.embed_dim, self.dtype)
    self.final_norm = RMSNorm(config.norm_eps)
    attend = attend_by_einsum if self.plain_gradients else self.attend
    arguments = (config, self.dropout, self.hidden_sharding, attend, self.plain_gradients)
    if self.scan_layers:
      # prevent_cse keeps the compiler from merging the two forward passes; in a scan
      # it cannot do so anyway, and the guard would cost fusion.
      layer = self._rematerialized(prevent_cse=False)
      self.layers = nn.scan(
        layer,
        variable_axes={'params': 0, 'rows': 0, 'lora': 0, 'intermediates': 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=(0, 0, nn.broadcast),  # pyright: ignore[reportArgumentType]: not only an int
        length=config.num_layers,
      )(*arguments)
    else:
      # is_local (argument 2, after self and carry) stays a Python bool.
      layer = self._rematerialized(static_argnums=(2,))
      self.layer = [layer(*arguments) for _ in range(config.num_layers)]

  def __call__(
    self,
    tokens: jax.Array,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    cache: Cache | None = None,
  ):
    """Runs the decoder.

    Args:
      tokens: int32 [B, T].
      segment_ids: int32 [B, T]; tokens see only their own segment, and 0 is
        padding, so a padding mask is the special case of one segment. Default: no
        padding.
      positions: int32 [B, T]. Default: counted from the row's first real
        token, those in the cache included; packed rows must give their own,
        restarted in each document.
      cache: keys and values of earlier tokens; the new ones are written after them.
        Rows are then padded on the left, so that all write the same slot.

    Returns:
      hidden states [B, T, D] after the final norm; with a cache, a pair of
      these and the updated cache.
    """
    if segment_ids is None:
      segment_ids = jnp.ones_like(tokens)
    if positions is None:
      positions = jnp.maximum(jnp.cumsum(segment_ids > 0, axis=1) - 1, 0)
      if cache is not None:
        positions += jnp.sum(cache.segment_ids > 0, axis=1, keepdims=True)
    if cache is not None:
      cache = dataclasses.replace(
        cache,
        positions=_write(cache.positions, positions, cache.index),
        segment_ids=_write(cache.segment_ids, segment_ids, cache.index),
      )
    context = self._context(segment_ids, positions, cache)
    x = _constrain(self.embedder.encode(tokens), self.hidden_sharding)
    self.sow('intermediates', 'embedded', x)
    kv = None if cache is None else (cache.k, cache.v)
    x, kv = self._run_layers(x, kv, context)
    x = self.final_norm(x)
    if cache is None or kv is None:  # both or neither
      return x
    index = cache.index + tokens.shape[1]
    return x, dataclasses.replace(cache, k=kv[0], v=kv[1], index=index)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """hidden [B, T, D] → float32 [B, T, V], with the model's soft cap, if any."""
    return softcap(self.embedder.decode(hidden), self.config.final_softcap)

  def _rematerialized(self, **options) -> type[Layer]:
    keep = REMAT[self.remat]
    return Layer if keep is None else nn.remat(Layer, policy=keep, **options)

  def _context(self, segment_ids, positions, cache) -> Context:
    config = self.config
    global_rotation = rope.rotations(
      positions, config.head_dim, config.rope_theta, config.rope_scale
    )
    local_rotation = rope.rotations(
      positions,
      config.head_dim,
      config.rope_local_theta or config.rope_theta,
      1.0 if config.rope_local_theta else config.rope_scale,
    )
    return Context(
      global_rotation=global_rotation,
      local_rotation=local_rotation,
      q_positions=positions,
      q_segment_ids=segment_ids,
      k_positions=positions if cache is None else cache.positions,
      k_segment_ids=segment_ids if cache is None else cache.segment_ids,
      index=None if cache is None else cache.index,
    )

  def _run_layers(self, x, kv, context):
    L = self.config.num_layers
    pattern = self.config.layer_is_local or (False,) * L
    if not self.scan_layers:
      for i, layer in enumerate(self.layer):
        (x, kv), _ = layer((x, kv), pattern[i], i, context)
      return x, kv
    carry, _ = self.layers((x, kv), jnp.array(pattern), jnp.arange(L), context)
    return carry


def _write(slots: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
  """slots [B, S] with new [B, T] from slot `index` on."""
  return jax.lax.dynamic_update_slice(slots, new.astype(slots.dtype), (0, index))


def _constrain(x: jax.Array, sharding) -> jax.Array:
  return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
