"""One layer's attention, forward and backward: einsum beside blocks.

  python -m experiments.benchmarks.attention [--lengths=512,1024] [--window=512]

The heads are those of Gemma 3 270M (4 of queries, 1 of keys and values, 256
wide), float32. A row is `full` of one segment, or `packed` with segments as
long as records are (log-normal, some 120 tokens on average). Each kernel is
compiled once and runs in turn with the other; prints a JSON line for each row:
median milliseconds per layer, their ratio, and seconds to compile.
"""

import argparse
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.model import attention, blocks, rope

_KERNELS = {'einsum': attention.attend_by_einsum, 'blocks': blocks.attend}
_LAYERS = 6


def main() -> None:
  """Prints a line for each length, packed and full."""
  parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument('--lengths', default='512,1024,2048,4096')
  parser.add_argument('--window', type=int, help='sliding window; none if unset')
  parser.add_argument('--repeats', type=int, default=5)
  options = parser.parse_args()
  for length in map(int, options.lengths.split(',')):
    for segments in 'packed', 'full':
      measured = measure(length, segments, options.window, options.repeats)
      print(json.dumps(measured), flush=True)


def measure(length: int, segments: str, window: int | None, repeats: int) -> dict[str, object]:
  """Times both kernels on one row, `packed` or `full`, in alternation."""
  ids, positions = packed(length) if segments == 'packed' else full(length)
  rotation = rope.rotations(positions, 256, 10_000.0)  # which the kernels do not look at
  context = attention.Context(rotation, rotation, positions, ids, positions, ids, None)
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.standard_normal((1, length, heads, 256), np.float32)) for heads in (4, 1, 1)
  )
  programs, compile_secs = {}, {}
  for name, attend in _KERNELS.items():
    start = time.perf_counter()
    step = jax.jit(functools.partial(_layers, attend, window))
    programs[name] = step.lower(q, k, v, context).compile()
    compile_secs[name] = round(time.perf_counter() - start, 1)
    jax.block_until_ready(programs[name](q, k, v, context))
  millis = {name: [] for name in programs}
  for _ in range(repeats):
    for name, program in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(program(q, k, v, context))
      millis[name].append(1e3 * (time.perf_counter() - start) / _LAYERS)
  medians = {n: round(statistics.median(x), 1) for n, x in millis.items()}
  return {
    'length': length,
    'segments': segments,
    'window': window,
    'milliseconds': medians,
    'ratio': round(medians['blocks'] / medians['einsum'], 3),
    'compile_seconds': compile_secs,
  }


def _layers(attend, window, q, k, v, context):
  """Gradients through a scan; layers are recomputed, as in training."""

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def layer(carry, _):
    q, k, v = carry
    out = attend(q, k, v, context, window, None)
    return (q + 0.01 * out, 1.01 * k, 1.01 * v), None

  def total(q, k, v):
    carry, _ = jax.lax.scan(layer, (q, k, v), None, length=_LAYERS)
    return jnp.sum(carry[0])

  return jax.grad(total, argnums=(0, 1, 2))(q, k, v)


def packed(length: int) -> tuple[jax.Array, jax.Array]:
  """Segment ids and positions [1, length]; the last segment is cut."""
  rng = np.random.default_rng(0)
  drawn = np.maximum(20, rng.lognormal(4.7, 0.8, length)).astype(int)
  ids = np.repeat(np.arange(length) + 1, drawn)[:length]
  positions = np.concatenate([np.arange(n) for n in drawn])[:length]
  return jnp.asarray(ids[None]), jnp.asarray(positions[None])


def full(length: int) -> tuple[jax.Array, jax.Array]:
  """Segment ids and positions [1, length] of one segment."""
  return jnp.ones((1, length), int), jnp.arange(length)[None]


if __name__ == '__main__':
  main()
