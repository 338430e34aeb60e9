"""Linear cross-entropy: hidden states and embedding in, loss out, no logits.

With V = 256k the logits [B, T, V] of one 512-token row are half a gigabyte, and
response-only training needs most of them for nothing. Here supervised positions
are brought together first, then taken in chunks of C: each chunk's logits
[C, V] live only inside one iteration, and the gradient to the hidden states is
made in that same iteration (the loss is a sum over positions, so a position's
gradient needs its own logits only). Work is proportional to the supervised
tokens, not to B T.

For logits z = cap(h E^T), target y and weight w the loss of a position is
w (logsumexp(z) - z[y]), and its gradient to z is w (softmax(z) - onehot(y));
the one-hot is never formed: its product with E is the row E[y].
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK_TOKENS = 256
_MASK_VALUE = -(2.0**30)


class _Options(NamedTuple):
  softcap: float | None
  num_pieces: int | None
  chunk_tokens: int


def linear_cross_entropy(
  hidden: jax.Array,
  embedding: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  softcap: float | None = None,
  num_pieces: int | None = None,
  chunk_tokens: int = CHUNK_TOKENS,
) -> jax.Array:
  """Weighted sum of the next-token losses, in nats.

  Differentiable in `hidden` and, if it is being differentiated, in
  `embedding`; a frozen embedding costs nothing. `weights` count as constants.

  Args:
    hidden: [B, T, D], after the final norm.
    embedding: [V, D], tied.
    targets: int32 [B, T].
    weights: float32 [B, T]; positions of weight 0 are never computed.
    softcap: of the logits, or None.
    num_pieces: rows of the embedding that are tokens; later rows are masked.
    chunk_tokens: C, positions whose logits exist at one time.

  Returns:
    float32 scalar; divide by the sum of the weights for the loss per token.
  """
  options = _Options(softcap, num_pieces, chunk_tokens)
  weights = jax.lax.stop_gradient(weights)
  return _loss_sum(options, hidden, embedding, targets, weights)


def token_cross_entropy(
  hidden: jax.Array,
  embedding: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  softcap: float | None = None,
  num_pieces: int | None = None,
  chunk_tokens: int = CHUNK_TOKENS,
) -> jax.Array:
  """Each supervised position's loss, for evaluation (no gradient).

  Arguments as in `linear_cross_entropy`.

  Returns:
    float32 [B, T], weight times nats; 0 where the weight is 0.
  """
  options = _Options(softcap, num_pieces, chunk_tokens)

  def visit(total, index, chunk):
    loss = chunk.weights * (chunk.logsumexp - chunk.target_logit)
    return total.at[index].add(loss, mode='drop')

  start = jnp.zeros(targets.size, jnp.float32)
  losses = _over_chunks(
    options, hidden, embedding, targets, weights, visit, start
  )
  return losses.reshape(targets.shape)


class _Chunk(NamedTuple):
  hidden: jax.Array  # [C, D]
  targets: jax.Array  # [C]
  weights: jax.Array  # [C]
  logits: jax.Array  # [C, V], capped and masked, float32
  logsumexp: jax.Array  # [C]
  target_logit: jax.Array  # [C]


def _over_chunks(options, hidden, embedding, targets, weights, visit, start):
  """Folds visit(state, index [C], chunk) over the supervised positions."""
  num_tokens, C = targets.size, options.chunk_tokens
  hidden = hidden.reshape(num_tokens, -1)
  targets, weights = targets.reshape(-1), weights.reshape(-1)
  supervised = weights != 0
  # Supervised positions first, in order; behind them an index past the end,
  # which reads as zeros of weight 0 and drops what is written.
  count = jnp.sum(supervised)
  order = jnp.argsort(~supervised, stable=True)
  order = jnp.where(jnp.arange(num_tokens) < count, order, num_tokens)
  order = jnp.pad(order, (0, -num_tokens % C), constant_values=num_tokens)
  num_chunks = -(-count // C)
  is_piece = _piece_mask(options, embedding.shape[0])

  def body(i, state):
    index = jax.lax.dynamic_slice(order, (i * C,), (C,))
    take = functools.partial(jnp.take, axis=0, mode='fill', fill_value=0)
    h, y, w = (take(x, index) for x in (hidden, targets, weights))
    logits = jnp.einsum(
      'CD,VD->CV',
      h,
      embedding.astype(h.dtype),
      preferred_element_type=jnp.float32,
    )
    if options.softcap is not None:
      logits = options.softcap * jnp.tanh(logits / options.softcap)
    if is_piece is not None:
      logits = jnp.where(is_piece[None], logits, _MASK_VALUE)
    chunk = _Chunk(
      hidden=h,
      targets=y,
      weights=w,
      logits=logits,
      logsumexp=jax.nn.logsumexp(logits, axis=-1),
      target_logit=jnp.take_along_axis(logits, y[:, None], axis=-1)[:, 0],
    )
    return visit(state, index, chunk)

  return jax.lax.fori_loop(0, num_chunks, body, start)


def _piece_mask(options, vocab_size):
  pieces = options.num_pieces
  if pieces is None or pieces >= vocab_size:
    return None
  return jnp.arange(vocab_size) < pieces


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sum(options, hidden, embedding, targets, weights):
  losses = token_cross_entropy(
    hidden, embedding, targets, weights, **options._asdict()
  )
  return jnp.sum(losses)


def _loss_sum_forward(options, hidden, embedding, targets, weights):
  """Loss and both gradients in one pass; the embedding's only on demand."""
  trains_embedding = embedding.perturbed
  hidden, embedding, targets, weights = (
    x.value for x in (hidden, embedding, targets, weights)
  )
  table = embedding.astype(hidden.dtype)

  def visit(state, index, chunk):
    loss, d_hidden, d_embedding = state
    w = chunk.weights[:, None]
    loss += jnp.sum(w[:, 0] * (chunk.logsumexp - chunk.target_logit))
    d_logits = jnp.exp(chunk.logits - chunk.logsumexp[:, None]) * w
    d_target = w
    if options.softcap is not None:  # d cap tanh(z / cap) = 1 - tanh^2
      slope = lambda z: 1 - jnp.square(z / options.softcap)
      # A masked row's probability is 0; its slope must not make that a NaN.
      d_logits *= jnp.clip(slope(chunk.logits), 0, 1)
      d_target = w * slope(chunk.target_logit[:, None])
    target_rows = jnp.take(table, chunk.targets, axis=0).astype(jnp.float32)
    dh = (
      jnp.einsum(
        'CV,VD->CD',
        d_logits.astype(hidden.dtype),
        table,
        preferred_element_type=jnp.float32,
      )
      - d_target * target_rows
    )
    d_hidden = d_hidden.at[index].set(dh.astype(d_hidden.dtype), mode='drop')
    if trains_embedding:
      h = chunk.hidden.astype(jnp.float32)
      d_embedding += jnp.einsum('CV,CD->VD', d_logits, h)
      d_embedding = d_embedding.at[chunk.targets].add(-d_target * h)
    return loss, d_hidden, d_embedding

  start = (
    jnp.float32(0),
    jnp.zeros((targets.size, hidden.shape[-1]), hidden.dtype),
    jnp.zeros(embedding.shape, jnp.float32) if trains_embedding else None,
  )
  loss, d_hidden, d_embedding = _over_chunks(
    options, hidden, embedding, targets, weights, visit, start
  )
  return loss, (d_hidden.reshape(hidden.shape), d_embedding, embedding)


def _loss_sum_backward(options, residuals, cotangent):
  del options
  d_hidden, d_embedding, embedding = residuals
  scale = cotangent.astype(jnp.float32)
  if d_embedding is not None:
    d_embedding = (scale * d_embedding).astype(embedding.dtype)
  d_scaled = (scale * d_hidden.astype(jnp.float32)).astype(d_hidden.dtype)
  return d_scaled, d_embedding, None, None


_loss_sum.defvjp(_loss_sum_forward, _loss_sum_backward, symbolic_zeros=True)
