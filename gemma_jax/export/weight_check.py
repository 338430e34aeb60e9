"""Whether a written model holds the weights that it should.

A logit says little about one weight, least of all in bfloat16, whose rounding
moves logits further than a small adapter does. So the weights are read back:

  a tensor of the base    equal to it, bit for bit, after the cast
  an adapted kernel       as close to W + scale * B A as the dtype permits

That sum is `factors.merge`'s, in float32, not the row-wise one that was written
(`export.merged`). One kernel at a time is in memory.
"""

from concurrent import futures
import dataclasses
import os

import jax
import numpy as np

from gemma_jax import pytree
from gemma_jax.export import merged
from gemma_jax.formats import base_source
from gemma_jax.formats.base_source import BaseSource
from gemma_jax.lora import factors as factors_lib
from gemma_jax.lora.lora import Lora
from gemma_jax.model import layout

# Difference of a merged weight between two orders of summation, relative to the
# kernel's largest weight.
_SUM_ERROR = 1e-6


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Measurements of an output whose weights are right.

  Attributes:
    largest_difference: of a written weight from the one in float32.
    num_changed: tensors with a weight that differs from the base's.
    update_kept: share of the adapter's update that survived rounding, over all
      weights (`_Update`); None without an adapter.
  """

  largest_difference: float
  num_changed: int
  update_kept: float | None = None


class _Update:
  """How much of an update U is in the written weights.

      kept = <round(W + U) - round(W), U> / <U, U>

  A rounded weight takes up a small update as a whole step, too large, or not at
  all: so what counts is the share in U's own direction, not the size.
  """

  def __init__(self):
    self._product = self._square = 0.0

  def add(self, intended: np.ndarray, survived: np.ndarray):
    """Adds float32 arrays of one shape to the count."""
    self._product += float(np.vdot(intended, survived))
    self._square += float(np.vdot(intended, intended))

  @property
  def kept(self) -> float | None:
    return self._product / self._square if self._square else None


def compare(
  source: BaseSource,
  written: BaseSource,
  dtype: np.dtype,
  lora: Lora | None = None,
) -> Comparison:
  """Reads all weights of an output and of the base it was made from.

  Args:
    source: the base.
    written: the output, whose embedding may have more or fewer rows.
    dtype: of the output.
    lora: the adapter that was merged, scanned or unrolled; None if there was none.

  Raises:
    ValueError: a tensor is not what it should be; names it.
  """
  if lora is not None:
    source_with = merged.merge(source, dataclasses.replace(lora, factors={}))
    flat = dict(pytree.items(merged.unrolled(lora.factors)))
  else:
    source_with, flat = source, {}
  shapes = dict(pytree.items(layout.abstract_params(source.config, scan_layers=False)))
  largest, num_changed, update = 0.0, 0, _Update()
  with (
    futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    jax.default_matmul_precision('highest'),
  ):
    for path in written.tensors:
      module = path.removesuffix('/w')
      if lora is not None and f'{module}/lora_a' in flat:
        own = {n: x for n, x in flat.items() if n.startswith(f'{module}/')}
        old, got = (_read(x, path, shapes[path].shape, pool) for x in (source_with, written))
        want = _merge(path, old, own, lora.scale)
        difference, changed = _compare_merged(path, want, got, old, dtype, update)
      else:
        difference, changed = _compare_kept(path, source, source_with, written, dtype, update)
      largest = max(largest, difference)
      num_changed += changed
  return Comparison(largest, num_changed, update.kept)


def _read(
  source: BaseSource, path: str, shape: tuple[int, ...], pool: futures.Executor
) -> np.ndarray:
  """A leaf in float32, with its own axes."""
  out = np.empty(shape, np.float32)
  source.read_into(path, out, pool)
  return out


def _merge(
  path: str, kernel: np.ndarray, factors: dict[str, np.ndarray], scale: float
) -> np.ndarray:
  """One kernel with its adapter, by `factors.merge`."""
  tree = factors_lib.merge(pytree.unflatten({path: kernel}), pytree.unflatten(factors), scale)
  return np.asarray(dict(pytree.items(tree))[path])


def _compare_merged(
  path: str, want: np.ndarray, got: np.ndarray, old: np.ndarray, dtype: np.dtype, update: _Update
) -> tuple[float, bool]:
  """Largest difference from float32's sum; whether the kernel changed."""
  slack = _SUM_ERROR * np.abs(want).max()
  largest, changed = 0.0, False
  for exact, stored, before in zip(want, got, old, strict=True):
    rounding = np.abs(exact.astype(dtype).astype(np.float32) - exact)
    difference = np.abs(stored - exact)
    # Not `any(difference > ...)`, which a NaN would pass.
    if not (difference <= rounding + slack).all():
      raise ValueError(
        f'output: tensor {path} differs from the base with the adapter by up '
        f'to {np.abs(got - want).max():.3g}, expected no more than rounding to '
        f'{dtype.name} gives; nothing was written.'
      )
    largest = max(largest, float(difference.max()))
    rounded = before.astype(dtype).astype(np.float32)
    changed = changed or not np.array_equal(stored, rounded)
    update.add(exact - before, stored - rounded)
  return largest, changed


def _compare_kept(
  path: str,
  source: BaseSource,
  source_with: BaseSource,
  written: BaseSource,
  dtype: np.dtype,
  update: _Update,
) -> tuple[float, bool]:
  """The rounding of a tensor without factors; whether it was trained too."""
  want, got = source_with.tensors[path], written.tensors[path]
  was_trained = want is not source.tensors[path]
  num_rows = min(want.shape[0], got.shape[0])
  step = base_source.chunk_rows(want.shape)
  largest, changed = 0.0, False
  for start in range(0, num_rows, step):
    stop = min(start + step, num_rows)
    exact, stored = want.read(start, stop), got.read(start, stop)
    if not np.array_equal(exact.astype(dtype), stored.astype(dtype)):
      raise ValueError(
        f'output: tensor {path} is not that of {source.reference} in '
        f'{dtype.name}; nothing was written.'
      )
    stored, exact = stored.astype(np.float32), exact.astype(np.float32)
    largest = max(largest, float(np.abs(stored - exact).max()))
    if was_trained:
      before = source.tensors[path].read(start, stop).astype(np.float32)
      rounded = before.astype(dtype).astype(np.float32)
      changed = changed or not np.array_equal(stored, rounded)
      update.add(exact - before, stored - rounded)
  return largest, changed
