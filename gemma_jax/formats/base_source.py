"""A base model on disk, and how its tensors become the parameter tree.

Files store a projection as a matrix [outputs, inputs], rows contiguous; the
tree stores it with its axes apart, inputs first (`gemma_jax.model.layout`). So
a kernel is read in ranges of rows, each cast and transposed straight into the
leaf it belongs to: the memory in use is the result and a few megabytes.
"""

import collections
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
import dataclasses
import hashlib
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax import pytree
from gemma_jax.formats import finite
from gemma_jax.formats import parts as parts_lib
from gemma_jax.formats.parts import Part
from gemma_jax.model import layout
from gemma_jax.model.config import ModelConfig

if TYPE_CHECKING:
  from gemma_jax.data.tokenizer import Tokenizer
  from gemma_jax.formats.trained_with import TrainedWith

# Elements read at a time: some megabytes, which a cache holds; hundreds of rows
# of a large matrix, so that what transposes them writes long runs.
CHUNK_ELEMENTS = 1 << 20

# Fields of an architecture that have always been in its fingerprint.
_FIRST_FIELDS = frozenset(
  (
    *('vocab_size', 'embed_dim', 'hidden_dim', 'num_layers', 'num_heads', 'num_kv_heads'),
    *('head_dim', 'query_scale', 'layer_is_local', 'window_size', 'rope_theta'),
    *('rope_local_theta', 'rope_scale', 'use_qk_norm', 'use_post_norms', 'attention_softcap'),
    *('final_softcap', 'norm_eps', 'max_positions'),
  )
)

_FINGERPRINT_BLOCKS = 256
_FINGERPRINT_BLOCK_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """One tensor of a checkpoint, read in ranges of rows.

  Attributes:
    name: its name in the file, for messages.
    shape: as stored: [outputs, inputs] for a projection, [V, D], [D] or [H].
    read: read(start, stop) → the rows [stop - start, ...] in float32, bfloat16
      or float16, with norm scales already without their 1. Threads call it at
      the same time.
  """

  name: str
  shape: tuple[int, ...]
  read: Callable[[int, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class BaseSource:
  """A base model that has been located and checked, but not read yet.

  Attributes:
    reference: what `open_base` was given.
    config: the architecture.
    stored_dtype: what `dtype='auto'` loads: bfloat16 if every tensor is stored as
      such, else float32 (dequantized GGUF, random weights).
    tensors: one for each leaf of the unrolled tree, by its path.
    files: the files that hold the weights; empty for random weights.
    make_tokenizer: makes the tokenizer, or None if there is none.
    read_chat_template: reads the Jinja template that came with the tokenizer, if
      there is one.
    read_stop_ids: reads the tokens at which, by its folder, an answer ends.
    read_trained_with: reads how the adapter that was merged into it was trained,
      if its folder says so.
  """

  reference: str
  config: ModelConfig
  stored_dtype: np.dtype
  tensors: Mapping[str, StoredTensor]
  files: tuple[Path, ...]
  make_tokenizer: Callable[[], 'Tokenizer | None']
  read_chat_template: Callable[[], str | None] = lambda: None
  read_stop_ids: Callable[[], tuple[int, ...]] = lambda: ()
  read_trained_with: Callable[[], 'TrainedWith | None'] = lambda: None

  def tokenizer(self) -> 'Tokenizer | None':
    """The base's tokenizer, or None if it came without one.

    Raises:
      ValueError: it cannot be read, or has more pieces than the embedding has
        rows.
    """
    tokenizer = self.make_tokenizer()
    rows = self.config.vocab_size
    if tokenizer is not None and tokenizer.vocab_size > rows:
      raise ValueError(
        f'tokenizer of {self.reference}: got {tokenizer.vocab_size} pieces, '
        f'expected at most {rows}, the rows of the embedding; give the '
        'tokenizer that this base was trained with (model.tokenizer).'
      )
    return tokenizer

  def fingerprint(self) -> str:
    """Hex sha256 of the architecture, the files' sizes and samples of them.

    The samples are evenly spaced blocks, first and last included, at most 16 MiB
    per file: all of a small file, and cheap for a large one. The fingerprint tells
    one base from another wherever they are; it does not detect a few flipped bytes.
    """
    digest = hashlib.sha256(_described(self.config).encode())
    if not self.files:
      digest.update(self.reference.encode())
    for path in self.files:
      size = path.stat().st_size
      digest.update(f'{size};'.encode())
      last = max(size - _FINGERPRINT_BLOCK_BYTES, 0)
      with path.open('rb') as f:
        for i in range(_FINGERPRINT_BLOCKS):
          f.seek(last * i // (_FINGERPRINT_BLOCKS - 1))
          digest.update(f.read(_FINGERPRINT_BLOCK_BYTES))
          if last == 0:
            break
    return digest.hexdigest()

  def load_params(
    self, dtype: Any = 'auto', scan_layers: bool = True, shardings: pytree.Tree | None = None
  ) -> pytree.Tree:
    """Reads the weights, leaf by leaf.

    Each chunk read goes straight to the parts of the leaf that devices of this
    process hold, and nowhere else: on CPU devices peak memory is the result
    and a few megabytes; elsewhere the host holds its part of one leaf at a
    time. No process has a whole copy of the model, or of a leaf that is split.

    Args:
      dtype: 'auto' (`stored_dtype`), 'bfloat16', 'float32' or a dtype.
      scan_layers: stack the layers (`layers/...` [L, ...]) or keep them apart
        (`layer_0/...`).
      shardings: tree of `jax.sharding.Sharding` of the result's structure;
        None puts every leaf on the default device.

    Returns:
      Nested dicts of jax arrays, as `layout.abstract_params`.

    Raises:
      ValueError: a file changed since it was opened, or holds a value that is
        not finite, or not in `dtype`.
    """
    dtype = weight_dtype(self, dtype)
    abstract = layout.abstract_params(self.config, dtype, scan_layers)
    placed = dict(pytree.items(shardings)) if shardings is not None else {}
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    leaves = {}
    with futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
      for path, leaf in pytree.items(abstract):
        leaves[path] = self._load_leaf(path, leaf.shape, dtype, placed.get(path, default), pool)
    return pytree.unflatten(leaves)

  def _load_leaf(
    self,
    path: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding,
    pool: futures.Executor,
  ) -> jax.Array:
    """Reads one leaf, scanned or unrolled, onto its devices."""
    by_device = parts_lib.make_parts(shape, dtype, sharding)
    mine = list({id(part): part for part in by_device.values()}.values())
    if path.startswith('layers/'):
      name = path.removeprefix('layers/')
      jobs = []
      for i in range(shape[0]):
        here = [part.layer(i) for part in mine if part.meets(i, i + 1)]
        jobs += self.jobs(f'layer_{i}/{name}', shape[1:], here)
    else:
      jobs = self.jobs(path, shape, mine)
    _run(jobs, pool)
    return parts_lib.to_devices(by_device, shape, sharding)

  def read_into(self, path: str, out: np.ndarray, pool: futures.Executor):
    """Fills an array of our own layout, of any strides and dtype.

    Args:
      path: a leaf of the unrolled tree, e.g. 'layer_3/attn/q/w'.
      out: [N, D, H] for that one; written to, cast once.
      pool: its threads do the work.
    """
    _run(self.jobs(path, out.shape, [Part.whole(out)]), pool)

  def jobs(self, path: str, shape: tuple[int, ...], parts: list[Part]) -> list[Callable[[], None]]:
    """Calls that together fill parts of one leaf of one layer.

    Args:
      path: of the unrolled tree.
      shape: of the leaf.
      parts: of the leaf; rows that none of them holds are not read.
    """
    tensor = self.tensors[path]
    order = _stored_order(path, len(shape))
    stored = [shape[i] for i in order]
    parts = [part.transpose(order) for part in parts]
    rows = tensor.shape[0] // stored[0]  # of the file, per index of this axis
    step = max(1, CHUNK_ELEMENTS * stored[0] // max(math.prod(stored), 1))

    def fill(start: int, stop: int):
      chunk = tensor.read(start * rows, stop * rows)
      # Before transposing, which is also faster.
      dtype = parts[0].out.dtype
      chunk = finite.narrow(chunk, dtype, tensor.name, self.reference, start * rows)
      chunk = chunk.reshape(stop - start, *stored[1:])
      for part in parts:
        part.take(chunk, start)

    return [
      lambda i=i: fill(i, min(i + step, stored[0]))
      for i in range(0, stored[0], step)
      if any(part.meets(i, i + step) for part in parts)
    ]


def _described(config: ModelConfig) -> str:
  """An architecture as text.

  A field that was added later counts only if it differs from its default, so that
  runs from before it can be resumed.
  """
  values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
  for field in dataclasses.fields(config):
    if field.name not in _FIRST_FIELDS and values[field.name] == field.default:
      del values[field.name]
  return f'ModelConfig({", ".join(f"{name}={value!r}" for name, value in values.items())})'


def _run(jobs: list[Callable[[], None]], pool: futures.Executor):
  for _ in pool.map(lambda job: job(), jobs):
    pass  # takes up what a thread raised


def weight_dtype(source: BaseSource, dtype: Any) -> np.dtype:
  """float32 or bfloat16; 'auto' is the base's own."""
  dtype = source.stored_dtype if dtype == 'auto' else jnp.dtype(dtype)
  if dtype not in (np.dtype(np.float32), np.dtype(jnp.bfloat16)):
    raise ValueError(
      f'dtype: got {dtype.name}, expected auto, float32 or bfloat16 (float16 overflows in Gemma).'
    )
  return dtype


def chunk_rows(shape: tuple[int, ...]) -> int:
  """How many rows of a stored tensor are read at a time."""
  return max(1, CHUNK_ELEMENTS // max(1, math.prod(shape[1:])))


def stored_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Shape in the file of every leaf of the unrolled tree, by path."""
  sizes = layout.axis_sizes(config)
  shapes = {}
  for path, letters in layout.param_axes(config, scan_layers=False).items():
    axes = layout.projection_axes(path) or letters
    shapes[path] = tuple(math.prod(sizes[c] for c in axis) for axis in axes)
  return shapes


def stored_view(path: str, leaf: np.ndarray) -> np.ndarray:
  """A leaf of one layer with its axes in the file's order (a view).

  layer_3/attn/q/w    [N, D, H] → [N, H, D]
  layer_3/mlp/down/w  [F, D]    → [D, F]
  """
  return leaf.transpose(_stored_order(path, leaf.ndim))


def _stored_order(path: str, num_axes: int) -> list[int]:
  """The leaf's axes in the order in which the file has them."""
  axes = layout.projection_axes(path)
  if axes is None:
    return list(range(num_axes))
  name = path.split('/', 1)[1].removesuffix('/w')
  kernel = layout.PROJECTION_EQUATIONS[name].split(',')[1].split('->')[0]
  return [kernel.index(c) for c in ''.join(axes)]


def match_tensors(
  names: Mapping[str, str], config: ModelConfig, stored: Mapping[str, StoredTensor], where: str
) -> dict[str, StoredTensor]:
  """Matches the tensors of a file to leaves: exactly those that the config asks for.

  Reading one raises a ValueError for a value that is not finite.

  Args:
    names: the file's name of each leaf of the unrolled tree, by path.
    config: gives the shapes.
    stored: the file's tensors by their names.
    where: the file or folder, for messages.

  Raises:
    ValueError: a tensor is missing, unexpected or wrongly shaped; names it.
  """
  missing = [name for name in names.values() if name not in stored]
  if missing:
    raise ValueError(
      f'{where}: tensor {missing[0]} is missing ({len(missing)} missing in '
      f'all), expected the {len(names)} tensors of {config.num_layers} layers.'
    )
  unexpected = sorted(stored.keys() - set(names.values()))
  if unexpected:
    raise ValueError(
      f'{where}: tensor {unexpected[0]} is unexpected ({len(unexpected)} '
      'such tensors), expected only the weights of a Gemma language model.'
    )
  tensors = {path: finite.checked(stored[name], where) for path, name in names.items()}
  for path, shape in stored_shapes(config).items():
    got = tensors[path].shape
    if got != shape:
      raise ValueError(
        f'{where}: tensor {tensors[path].name} has shape {list(got)}, '
        f'expected {list(shape)}, as the configuration says.'
      )
  return tensors


def log_left_out(where: str, prefixes: Iterable[str]):
  """Says which tensors, by their prefixes, are not of the language model and so not read."""
  counts = collections.Counter(prefixes)
  if counts:
    of_each = ', '.join(f'{prefix}* x {n}' for prefix, n in sorted(counts.items()))
    logging.info('%s: leaves out what is not of the language model: %s', where, of_each)


def check_layer_count(num_layers: Any, num_tensors: int, where: str):
  """Rejects a layer count that a file cannot hold, before any work is done."""
  if not isinstance(num_layers, int) or not 0 < num_layers <= num_tensors:
    raise ValueError(
      f'{where}: got {num_layers!r:.80} layers, expected an integer from 1 to '
      f'{num_tensors}, the number of tensors.'
    )
