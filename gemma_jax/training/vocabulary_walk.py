"""A walk through the vocabulary in tiles, with the logits of a few positions.

Supervised positions are gathered first; then each keeps a running
maximum and sum, as in attention that never holds its scores (Dao et al. 2022,
arXiv 2205.14135, algorithm 1):

    for each tile of rows E_t of the embedding, for each chunk of positions h
      z = cap(h E_t^T)                   [C, C_V], the only logits there are
      m' = max(m, max z),  p = exp(z - m'),  r = exp(m - m')
      s  = r s + sum p                   logsumexp = m + log s at the end
      g  = r g + p E_t                   softmax(z) E = g / s at the end

For target y and weight w the loss of a position is w (logsumexp - z[y]) and its
gradient w (g / s - E[y]), made in the same pass: no logit is kept or computed
twice. Work is proportional to the supervised tokens, not to B T; a tile is read
(and cast) once for all positions, and stays in cache while they use it.

The embedding's gradient is a sum over positions that needs each one's cotangent
and final logsumexp, so it takes a second walk.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

# (sizes, C_V): logits exist for one chunk of positions and one tile of C_V
# embedding rows at a time. Positions are walked in chunks of the first size, the
# remainder in chunks of the next, smaller one. On a CPU a tile and its
# logits stay in cache (with 1,024 positions, chunks of 128 alone reach 75 % of
# the rate of a matrix product, and those of 512 reach 90 %); an accelerator
# wants large products.
Chunk = tuple[tuple[int, ...], int]
CPU_CHUNK: Chunk = ((512, 128), 1024)
ACCELERATOR_CHUNK: Chunk = ((512,), 8192)
# The last chunk is computed whole, however few of its positions count: so the
# smallest size is at most this share of the device's positions.
_SMALLEST_CHUNK_SHARE = 1 / 4
_MASK_VALUE = -(2.0**30)


class Options(NamedTuple):
  softcap: float | None
  num_pieces: int | None
  sharding: NamedSharding | None
  chunk: Chunk | None


def losses_on_device(
  options: Options,
  wanted: tuple[str, ...],
  row_axes: tuple[str, ...],
  column_axes: tuple[str, ...],
  hidden: jax.Array,
  embedding: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
) -> dict[str, jax.Array]:
  """Each position's loss and more, from one device's share.

  Args:
    options: static.
    wanted: any of 'losses', 'd_hidden' (a loss's gradient), 'logsumexp' and 'slope'
      (the soft cap's, at the target's logit).
    row_axes: mesh axes over which rows are divided.
    column_axes: mesh axes over which the vocabulary is divided.
    hidden: [B, T, D], this device's rows.
    embedding: [V, D], this device's part of the vocabulary.
    targets: [B, T].
    weights: [B, T].

  Returns:
    name → float32 [B, T], or of `hidden`'s shape and dtype; 0 where the weight
    is 0.
  """
  del row_axes
  share = _share(options, column_axes, hidden, embedding, weights)
  y, w = share.gather(targets), share.gather(weights)  # [S]
  total = lambda x: jax.lax.psum(x, column_axes) if column_axes else x

  m, s, g = _statistics(options, share, 'd_hidden' in wanted)
  largest = jax.lax.pmax(m, column_axes) if column_axes else m
  rescale = jnp.exp(m - largest)
  s = jnp.maximum(total(s * rescale), 1.0)  # the largest term; 0 if not visited
  logsumexp = largest + jnp.log(s)

  # The target's row, from the device that has it.
  number, is_here = share.row_of(y)
  row = jnp.take(embedding, jnp.where(is_here, number, 0), axis=0)
  row = jnp.where(is_here[..., None], row, 0).astype(jnp.float32)
  target_logit = total(jnp.sum(share.h.astype(jnp.float32) * row, axis=-1))
  target_logit, slope = _capped(options, target_logit)
  if options.num_pieces is not None:
    # A target beyond the tokens has no probability; a check of the loss sees it.
    target_logit = jnp.where(y < options.num_pieces, target_logit, -jnp.inf)

  results = {'losses': w * (logsumexp - target_logit), 'logsumexp': logsumexp, 'slope': slope}
  results = {name: share.scatter(x, weights) for name, x in results.items() if name in wanted}
  if 'd_hidden' in wanted:
    d = g * (rescale / s)[..., None] - row * slope[..., None]
    results['d_hidden'] = share.scatter(total(d) * w[..., None], hidden)
  return results


def embedding_gradient_on_device(
  options: Options,
  wanted: tuple[str, ...],
  row_axes: tuple[str, ...],
  column_axes: tuple[str, ...],
  hidden: jax.Array,
  embedding: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  cotangent: jax.Array,
  logsumexp: jax.Array,
  slope: jax.Array,
) -> dict[str, jax.Array]:
  """The embedding's gradient, for this device's part of the vocabulary.

  Args as in `losses_on_device`, the last two from its results, and:
    cotangent: float32 [B, T], the losses'.

  Returns:
    {'d_embedding': [V, D], summed over the rows of all devices}.
  """
  del wanted
  share = _share(options, column_axes, hidden, embedding, weights)
  w = share.gather(weights) * share.gather(cotangent)
  d = _embedding_gradient(options, share, share.gather(logsumexp), w)
  target_term = -share.h.astype(jnp.float32) * (w * share.gather(slope))[..., None]
  number, is_here = share.row_of(share.gather(targets))
  d = d.at[jnp.where(is_here, number, len(embedding))].add(target_term, mode='drop')
  d = jax.lax.psum(d, row_axes) if row_axes else d
  return {'d_embedding': d.astype(embedding.dtype)}


class _Walk(NamedTuple):
  """Consecutive chunks of one size.

  Attributes:
    size: C, positions in a chunk.
    start: int32 [], the first position.
    count: int32 [], number of chunks.
  """

  size: int
  start: jax.Array
  count: jax.Array


def _walks(sizes: tuple[int, ...], supervised: jax.Array) -> list[_Walk]:
  """Walks over the positions that count, the smallest chunks last.

  A larger chunk also takes a remainder that fills it up to less than one smallest
  chunk: 511 positions are one chunk of 512, not four of 128. So the walks end
  less than one smallest chunk past the last position that counts.
  """
  walks, start = [], jnp.zeros_like(supervised)
  for size in sizes:
    left = jnp.maximum(supervised - start, 0)
    count = (left + sizes[-1] - 1) // size
    walks.append(_Walk(size, start, count))
    start += count * size
  return walks


class _Share(NamedTuple):
  """What one device walks through.

  Attributes:
    h: hidden states [S, D], supervised positions first.
    embedding: [V, D].
    order: int32 [S], each position's index in flat [B T]; past the supervised ones
      B T itself, where reads give zeros and writes are dropped.
    offset: index of the embedding's first row in the whole vocabulary.
    walks: chunks that hold a supervised position.
    tile_rows: C_V.
  """

  h: jax.Array
  embedding: jax.Array
  order: jax.Array
  offset: jax.Array | int
  walks: list[_Walk]
  tile_rows: int

  def gather(self, x: jax.Array) -> jax.Array:
    """[B, T, ...] → [S, ...]."""
    return _gather(x, self.order)

  def scatter(self, x: jax.Array, like: jax.Array) -> jax.Array:
    """[S, ...] → `like`'s shape and dtype, 0 where nothing is supervised."""
    B, T, *rest = like.shape
    flat = jnp.zeros((B * T, *rest), like.dtype)
    return flat.at[self.order].set(x.astype(like.dtype), mode='drop').reshape(like.shape)

  def row_of(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each token's row of `embedding`, and whether it is on this device."""
    number = tokens - self.offset
    return number, (number >= 0) & (number < len(self.embedding))

  def visit(self, visit_chunk: Callable[..., Any], state: Any) -> Any:
    """state = visit_chunk(start, size, state) for each chunk in turn."""
    for walk in self.walks:

      def visit_next(i, state, walk=walk):
        return visit_chunk(walk.start + i * walk.size, walk.size, state)

      state = jax.lax.fori_loop(0, walk.count, visit_next, state)
    return state


def _share(options, column_axes, hidden, embedding, weights) -> _Share:
  """One device's share, from its arrays as `losses_on_device` takes them."""
  V, end = len(embedding), weights.size
  sizes, C_V = _chunk_sizes(options, end)
  # A walk's last chunk ends less than sizes[-1] past the supervised positions,
  # so no chunk's slice is clamped.
  order = jnp.flatnonzero(weights, size=end + sizes[-1], fill_value=end)
  return _Share(
    h=_gather(hidden, order),
    embedding=embedding,
    order=order,
    offset=jax.lax.axis_index(column_axes) * V if column_axes else 0,
    walks=_walks(sizes, jnp.count_nonzero(weights)),
    tile_rows=min(C_V, V),
  )


def _gather(x: jax.Array, order: jax.Array) -> jax.Array:
  x = x.reshape(-1, *x.shape[2:])
  return jnp.take(x, order, axis=0, mode='fill', fill_value=0)


def _statistics(options: Options, share: _Share, with_gradient: bool):
  """m, s [S] and g [S, D] (or None), as in the module docstring."""
  S, D = share.h.shape

  def visit_tile(number, state):
    _, tile, is_fresh = _tile(options, share, number)

    def visit_chunk(start, size, state):
      m, s, g = jax.tree.map(lambda x: _part(x, start, size), state)
      z, slope = _logits(options, _part(share.h, start, size), tile, is_fresh)
      new_m = jnp.maximum(m, jnp.max(z, axis=-1))
      p, r = jnp.exp(z - new_m[:, None]), jnp.exp(m - new_m)
      new_s = r * s + jnp.sum(p, axis=-1)
      if g is not None:
        g = r[:, None] * g + _dot('CV,VD->CD', p * slope, tile)
      return jax.tree.map(
        lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, start, 0),
        state,
        (new_m, new_s, g),
      )

    return share.visit(visit_chunk, state)

  state = (
    jnp.full(S, _MASK_VALUE, jnp.float32),
    jnp.zeros(S, jnp.float32),
    jnp.zeros((S, D), jnp.float32) if with_gradient else None,
  )
  return jax.lax.fori_loop(0, _num_tiles(share), visit_tile, state)


def _embedding_gradient(
  options: Options, share: _Share, logsumexp: jax.Array, w: jax.Array
) -> jax.Array:
  """Sum of w softmax(z) h over the positions: float32 [V, D]."""

  def visit_tile(number, state):
    first_row, tile, is_fresh = _tile(options, share, number)

    def visit_chunk(start, size, d_tile):
      h = _part(share.h, start, size)
      z, slope = _logits(options, h, tile, is_fresh)
      p = jnp.exp(z - _part(logsumexp, start, size)[:, None])
      p *= _part(w, start, size)[:, None] * slope
      return d_tile + _dot('CV,CD->VD', p, h)

    d_tile = jax.lax.dynamic_slice_in_dim(state, first_row, len(tile))
    d_tile = share.visit(visit_chunk, d_tile)
    return jax.lax.dynamic_update_slice_in_dim(state, d_tile, first_row, 0)

  state = jnp.zeros(share.embedding.shape, jnp.float32)
  return jax.lax.fori_loop(0, _num_tiles(share), visit_tile, state)


def _num_tiles(share: _Share) -> int:
  return -(-share.embedding.shape[0] // share.tile_rows)


def _tile(options: Options, share: _Share, number: jax.Array):
  """Rows of the embedding, and which of them are new tokens.

  Returns:
    The first row, the rows [C_V, D] in the dtype of the hidden states, and a
    mask bool [C_V] or None: the last tile is moved back to end with the
    embedding, and rows beyond the tokenizer's pieces are not tokens.
  """
  V, rows = share.embedding.shape[0], share.tile_rows
  start = jnp.minimum(number * rows, V - rows)
  tile = jax.lax.dynamic_slice_in_dim(share.embedding, start, rows)
  row, is_fresh = start + jnp.arange(rows), None
  if V % rows:
    is_fresh = row >= number * rows
  if options.num_pieces is not None:
    is_piece = share.offset + row < options.num_pieces
    is_fresh = is_piece if is_fresh is None else is_fresh & is_piece
  return start, tile.astype(share.h.dtype), is_fresh


def _logits(options, h, tile, is_fresh):
  """h [C, D], tile [C_V, D] → capped, masked logits and the cap's slope."""
  z, slope = _capped(options, _dot('CD,VD->CV', h, tile))
  if is_fresh is not None:
    z = jnp.where(is_fresh[None], z, _MASK_VALUE)
  return z, slope


def _capped(options, z):
  """cap tanh(z / cap) and its derivative 1 - tanh^2, both float32."""
  if options.softcap is None:
    return z, jnp.ones_like(z)
  tanh = jnp.tanh(z / options.softcap)
  return options.softcap * tanh, 1 - jnp.square(tanh)


def _part(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(x, start, size)


def _dot(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """Product in y's dtype, summed in float32."""
  return jnp.einsum(equation, x.astype(y.dtype), y, preferred_element_type=jnp.float32)


def _chunk_sizes(options: Options, num_positions: int) -> Chunk:
  if options.chunk is not None:
    return options.chunk
  if options.sharding is None:
    platform = jax.default_backend()
  else:
    mesh = options.sharding.mesh
    assert isinstance(mesh, jax.sharding.Mesh)  # with devices, not an abstract one
    platform = mesh.devices.flat[0].platform
  sizes, C_V = CPU_CHUNK if platform == 'cpu' else ACCELERATOR_CHUNK
  last = min(sizes[-1], math.ceil(num_positions * _SMALLEST_CHUNK_SHARE))
  larger = (min(size, num_positions) for size in sizes[:-1])
  return (*(size for size in larger if size > last), last), C_V
