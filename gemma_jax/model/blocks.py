"""Attention a block of queries at a time, each with the keys that it may see.

Keys behind the block's last query, or before its first one's window, are never
multiplied: of n blocks' scores a share of (n - 1) / 2n without a window (37 %
of a row of 512), more with one; and a block's scores stay in cache. Keys are
left out by their index within the row, as `splash` masks them and under the
same condition: a segment's tokens stand together, one position apart.

A block of a packed long row also leaves out keys before its first query's
segment. Where that begins is known only when the step runs, so such a block has
programs for 1, 3, 7, ... blocks of keys before its own, and one for all of
them; the shortest that does for all rows runs, and again in the backward pass,
whatever `remat` says.

On two cores of an AMD EPYC, forward and backward of a layer of the 270M take
18 ms for 1 x 512 tokens (41 ms by one einsum), and 25 ms for 4 x 256 (35 ms).
What the choice of programs changes, with segments of 170 tokens on average
and with one that fills the row, and what it adds to compiling:

  row                  packed, ms     full, ms     compiling, s
  1 x 1024             66 to 42       65 to 69     2.0 to 2.9
  1 x 1024, window 512 53 to 45       55 to 66     1.6 to 2.6
  1 x 2048             299 to 106     311 to 274   1.8 to 7.5
  1 x 2048, window 512 184 to 120     164 to 154   1.6 to 6.0
  1 x 4096             1798 to 348                 2.4 to 8.1
"""

import functools

import jax
import jax.numpy as jnp

from gemma_jax.model.attention import Context, attend_by_einsum

# Each block is compiled, so that long rows have longer ones, not more of them.
_MIN_QUERIES = 128
_MAX_BLOCKS = 16
# Packed rows of 512 gain nothing by leaving segments out.
_LONG_ROW = 1024


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  context: Context,
  window: int | None,
  cap: float | None,
) -> jax.Array:
  """An `attention.Attend`: q [B, T, N, H], k and v [B, T, K, H]."""
  T = q.shape[1]
  size = max(_MIN_QUERIES, -(-T // _MAX_BLOCKS))
  outs = []
  for start in range(0, T, size):
    stop = min(start + size, T)
    first = 0 if window is None else max(0, start - window + 1)
    firsts = [first]
    if T >= _LONG_ROW:
      firsts += _later_firsts(first, start, size)
    programs = [
      functools.partial(_attend, start, stop, f, window, cap) for f in firsts
    ]
    if len(programs) == 1:
      outs.append(programs[0](q, k, v, context))
      continue
    # What one program keeps for the backward pass all would have to return.
    programs = [jax.checkpoint(p, prevent_cse=False) for p in programs]
    begin = _segment_start(context, start)
    index = sum((begin >= f).astype(jnp.int32) for f in firsts[1:])
    outs.append(jax.lax.switch(index, programs, q, k, v, context))
  return jnp.concatenate(outs, axis=1)


def _later_firsts(first: int, start: int, size: int) -> list[int]:
  """Keys behind `first` that lie ..., 7, 3, 1 blocks before the block's own.

  For the block at 896 of a row of 1024: 512 and 768.
  """
  later, blocks = [], 1
  while start - blocks * size > first:
    later.append(start - blocks * size)
    blocks = 2 * blocks + 1
  return later[::-1]


def _segment_start(context: Context, start: int) -> jax.Array:
  """The least index, over the rows, of a key of query `start`'s segment.

  Where that query is padding, a later one's segment begins behind it.
  """
  segment = context.q_segment_ids[:, start, None]
  same = (context.k_segment_ids == segment) & (segment > 0)
  return jnp.min(jnp.where(jnp.any(same, 1), jnp.argmax(same, 1), start))


def _attend(start, stop, first, window, cap, q, k, v, context):
  queries, keys = slice(start, stop), slice(first, stop)
  part = context._replace(
    q_positions=context.q_positions[:, queries],
    q_segment_ids=context.q_segment_ids[:, queries],
    k_positions=context.k_positions[:, keys],
    k_segment_ids=context.k_segment_ids[:, keys],
  )
  return attend_by_einsum(
    q[:, queries], k[:, keys], v[:, keys], part, window, cap
  )
