"""Attention one block of queries at a time, each with the keys that it may see.

Keys after the block's last query, or before its first one's window, are never
multiplied: with n blocks that saves a share of (n - 1) / 2n of the scores without
a window (37 % of a row of 512), more with one; and a block's scores stay in cache.
Keys are left out by their index within the row, as `splash` masks them and under
the same condition: a segment's tokens are adjacent, one position apart.

A block of a long packed row also leaves out keys before its first query's segment.
Where that begins is known only when the step runs, so such a block has programs
for 1, 3, 7, ... blocks of keys before its own, and one for all of them; the
shortest that suffices for all rows runs, and again in the backward pass, whatever
`remat` says.

Forward and backward of a layer of the 270M, on two cores of an AMD EPYC, by
`python -m experiments.benchmarks.attention`, in milliseconds; packed segments
have some 120 tokens:

  row       einsum  blocks, packed  blocks, full
  1 x 512      34        20             20
  1 x 1024    116        42             73
  1 x 2048    518       106            306

Compiling takes 3 s at 1,024 and 8 s at 2,048, einsum 0.5 s. If one segment fills
a row of 1,024, the choice costs 6 to 20 % (README of the benchmarks).
"""

import functools

import jax
import jax.numpy as jnp

from gemma_jax.model.attention import Context, attend_by_einsum

# Each block is compiled, so long rows have longer blocks rather than more of them.
_MIN_QUERIES = 128
_MAX_BLOCKS = 16
# Packed rows of 512 gain nothing from leaving segments out.
_LONG_ROW = 1024


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, context: Context, window: int | None, cap: float | None
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
    programs = [functools.partial(_attend, start, stop, f, window, cap) for f in firsts]
    if len(programs) == 1:
      outs.append(programs[0](q, k, v, context))
      continue
    # What one program keeps for the backward pass, all would have to return.
    programs = [jax.checkpoint(p, prevent_cse=False) for p in programs]
    begin = _segment_start(context, start)
    index = sum((begin >= f).astype(jnp.int32) for f in firsts[1:])
    outs.append(jax.lax.switch(index, programs, q, k, v, context))
  return jnp.concatenate(outs, axis=1)


def _later_firsts(first: int, start: int, size: int) -> list[int]:
  """Keys after `first` that lie ..., 7, 3, 1 blocks before the block's own.

  For the block at 896 of a row of 1024: 512 and 768.
  """
  later, blocks = [], 1
  while start - blocks * size > first:
    later.append(start - blocks * size)
    blocks = 2 * blocks + 1
  return later[::-1]


def _segment_start(context: Context, start: int) -> jax.Array:
  """The least index, over the rows, of a key of query `start`'s segment.

  If that query is padding, a later query's segment begins after it.
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
  return attend_by_einsum(q[:, queries], k[:, keys], v[:, keys], part, window, cap)
