"""A base with an adapter in its kernels, as a base: merged while it is read.

    W' = W + scale * B A, in float32 and by rows: W'[i] = W[i] + scale * B[i] A

and, with DoRA, W'[i] is brought to the length m[i]. The reader casts once, to the
dtype it wants. Only the factors are held in memory, so a model of any size is
merged in the memory of its adapter.
"""

import dataclasses
import functools
import math

import jax
import numpy as np

from gemma_jax import pytree
from gemma_jax.formats import base_source
from gemma_jax.formats.base_source import BaseSource, StoredTensor
from gemma_jax.lora import matrices
from gemma_jax.lora.lora import Lora
from gemma_jax.model import layout

# Relative difference of a row's length in float32, summed in one order or in
# another. A length this close changes nothing: an untrained DoRA adapter gives
# the base, bit for bit.
_NORM_ERROR = 2.0**-19


def merge(source: BaseSource, lora: Lora) -> BaseSource:
  """The base that computes what `source` computes with the adapter.

  Args:
    source: the base.
    lora: one adapter, scanned or unrolled; leaves of the base that were trained
      with it replace the base's.

  Returns:
    A source whose changed tensors are read in float32; the others and
    `stored_dtype` are the base's.

  Raises:
    ValueError: a leaf does not fit the base.
  """
  tensors = dict(source.tensors)
  for path, leaf in pytree.items(unrolled(lora.trained_base)):
    if path not in tensors:
      raise ValueError(
        f'trained base leaf {path}: {source.reference} has none of that name; '
        'it belongs to another architecture.'
      )
    shape = tensors[path].shape
    if leaf.size != math.prod(shape):
      raise ValueError(
        f'trained base leaf {path}: got {leaf.size} values, expected a kernel '
        f'of {list(shape)}; it belongs to another architecture.'
      )
    rows = base_source.stored_view(path, leaf).reshape(shape)
    tensors[path] = StoredTensor(path, shape, lambda i, j, rows=rows: rows[i:j])
  factors = dict(pytree.items(unrolled(lora.factors)))
  for path, a in factors.items():
    module, _, factor = path.rpartition('/')
    if factor != 'lora_a':
      continue
    a, b = matrices.matrices(module.split('/', 1)[1], a, factors[f'{module}/lora_b'], lora.config)
    old = tensors.get(f'{module}/w')
    if old is None or old.shape != (len(b), a.shape[1]):
      got = None if old is None else list(old.shape)
      raise ValueError(
        f'adapter: {module} is made for a kernel {[len(b), a.shape[1]]}, but '
        f'that of {source.reference} is {got}; it belongs to another base.'
      )
    magnitude = factors.get(f'{module}/lora_magnitude')
    tensors[f'{module}/w'] = StoredTensor(
      old.name,
      old.shape,
      functools.partial(
        _merged_rows,
        old,
        np.ascontiguousarray(a, np.float32),
        np.ascontiguousarray(b * np.float32(lora.scale), np.float32),
        None if magnitude is None else magnitude.reshape(-1, 1),
      ),
    )
  return dataclasses.replace(source, tensors=tensors)


def unrolled(tree: pytree.Tree) -> pytree.Tree:
  """The tree on the host, with its layers unrolled."""
  tree = jax.device_get(tree)
  return layout.unstack_layers(tree) if 'layers' in tree else tree


def _merged_rows(
  old: StoredTensor,
  a: np.ndarray,
  b: np.ndarray,
  magnitude: np.ndarray | None,
  start: int,
  stop: int,
) -> np.ndarray:
  rows = old.read(start, stop).astype(np.float32) + b[start:stop] @ a
  if magnitude is not None:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    wanted = magnitude[start:stop]
    is_plain = (wanted == 0) | (norms == 0)
    is_plain |= np.abs(wanted - norms) <= _NORM_ERROR * norms
    rows *= np.where(is_plain, 1, wanted / np.where(is_plain, 1, norms))
  return rows
