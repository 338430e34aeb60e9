"""The Flax release of Gemma 1, 2 and 3 (Orbax), read; `flax_writer` writes it.

    gemma-2b/tokenizer.model
    gemma-2b/2b/                   Orbax: an array for each name below
      transformer/embedder                     input_embedding [V, D]
      transformer/layer_0/attn/q_einsum        w [N, D, H]
      transformer/layer_0/attn/kv_einsum       w [2, K, D, H]     k, v
      transformer/layer_0/mlp/gating_einsum    w [2, D, F]        gate, up

With as many kv heads as query heads, `qkv_einsum` [3, N, D, H] replaces the first
two; Gemma 3, and Gemma 2 from 9B on, store gate and up as [2, F, D].
Names are flat (as above) or nested dicts, with or without the `w` of the MLP:
all of these are read. The arrays are read through TensorStore, one at a time;
nothing is unpickled.
"""

import collections
from collections.abc import Collection, Iterable, Mapping
import dataclasses
import functools
import math
from pathlib import Path
import re
import threading
from typing import Any

import ml_dtypes
import numpy as np

from gemma_jax.formats import base_source, finite, flax_config
from gemma_jax.formats.base_source import BaseSource, StoredTensor
from gemma_jax.model import layout
from gemma_jax.model.config import ModelConfig

FOLDER_NAME = 'params'
_MARKERS = ('_METADATA', 'manifest.ocdbt', 'checkpoint')
_ARRAY_FILES = {'zarr': '.zarray', 'zarr3': 'zarr.json'}
_VISION = re.compile(r'(vision_encoder|SigLiP\w*)/|embedder/mm_')
_DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a leaf of our tree lies in the release.

  Attributes:
    name: of the array, e.g. 'layer_3/attn/kv_einsum/w'.
    shape: of the array.
    index: of the leaf along the array's first axis; None if it is all of it.
    swapped: whether the leaf's two axes are stored in the opposite order.
  """

  name: str
  shape: tuple[int, ...]
  index: int | None = None
  swapped: bool = False

  def view(self, array: np.ndarray) -> np.ndarray:
    """The leaf (of the array, or of its part at `index`) with its own axes."""
    return array.swapaxes(0, 1) if self.swapped else array


def find(folder: Path) -> Path | None:
  """The Orbax folder: the given one, or the only one in it; None if neither.

  Raises:
    ValueError: there are several.
  """
  if _is_orbax(folder):
    return folder
  inner = sorted(p for p in folder.iterdir() if p.is_dir() and _is_orbax(p))
  if len(inner) > 1:
    names = ', '.join(p.name for p in inner)
    raise ValueError(f'{folder}: there are several models in it ({names}); give the path to one.')
  return inner[0] if inner else None


def open_folder(folder: Path, reference: str) -> BaseSource:
  """A Flax release as a base model; reads names and shapes only.

  Args:
    folder: the Orbax folder, or the one that holds it and tokenizer.model.
    reference: what the user called it.

  Raises:
    ValueError: not a Flax release of Gemma, or an array is missing, unexpected,
      wrongly shaped or of an unknown dtype; names the folder and the array.
  """
  root = find(folder)
  if root is None:
    raise ValueError(f'{folder}: there is no Orbax checkpoint in it.')
  arrays = _open_arrays(root)
  shapes = {name: tuple(array.shape) for name, array in arrays.items()}
  tokenizer = root / 'tokenizer.model'
  if not tokenizer.is_file():
    tokenizer = root.parent / 'tokenizer.model'
  config = flax_config.model_config(shapes, root)
  fused = 'layer_0/attn/qkv_einsum/w' in shapes
  gating = shapes.get('layer_0/mlp/gating_einsum/w', ())
  D, F = config.embed_dim, config.hidden_dim
  swapped = gating == (2, F, D) and (D != F or gating_is_swapped(config))
  places = make_places(config, fused, swapped)
  _check(places, arrays, root)
  dtypes = {array.dtype.numpy_dtype for array in arrays.values()}
  cache = _Cache(arrays, root)
  tensors = {
    path: finite.checked(
      StoredTensor(
        places[path].name, shape, functools.partial(cache.read, path, places[path], shape)
      ),
      str(folder),
    )
    for path, shape in base_source.stored_shapes(config).items()
  }
  return BaseSource(
    reference=reference,
    config=config,
    stored_dtype=np.dtype(
      ml_dtypes.bfloat16 if dtypes == {np.dtype(ml_dtypes.bfloat16)} else np.float32
    ),
    tensors=tensors,
    files=tuple(
      p for p in sorted(root.rglob('*')) if p.is_file() and p.name != '_CHECKPOINT_METADATA'
    ),
    make_tokenizer=functools.partial(_tokenizer, tokenizer),
    read_trained_with=functools.partial(_trained_with, root),
  )


def make_places(config: ModelConfig, fused: bool, swapped: bool) -> dict[str, Place]:
  """Where each leaf of the unrolled tree lies.

  Args:
    config: the architecture, with the release's number of rows in its vocabulary.
    fused: q, k and v in one array (`qkv_einsum`).
    swapped: gate and up as [2, F, D].
  """
  sizes = layout.axis_sizes(config)
  places = {}
  for path, letters in layout.param_axes(config, scan_layers=False).items():
    shape = tuple(sizes[c] for c in letters)
    layer, _, name = path.partition('/')
    if name in ('mlp/gate/w', 'mlp/up/w'):
      places[path] = Place(
        f'{layer}/mlp/gating_einsum/w',
        (2, *(shape[::-1] if swapped else shape)),
        int(name == 'mlp/up/w'),
        swapped,
      )
    elif fused and name in _IN_QKV:
      places[path] = Place(f'{layer}/attn/qkv_einsum/w', (3, *shape), _IN_QKV.index(name))
    elif name in _IN_KV:
      places[path] = Place(f'{layer}/attn/kv_einsum/w', (2, *shape), _IN_KV.index(name))
    else:
      places[path] = Place(f'{layer}/{_NAMES.get(name, name)}', shape)
  return places


def gating_is_swapped(config: ModelConfig) -> bool:
  """Whether the release of this architecture has gate and up as [2, F, D].

  Gemma 3 does, and so do Gemma 2 9B and 27B (42 and 46 layers):
  `transpose_gating_einsum` in github.com/google-deepmind/gemma.
  """
  large = config.use_post_norms and config.num_layers in (42, 46)
  return config.use_qk_norm or large


_IN_QKV = ('attn/q/w', 'attn/k/w', 'attn/v/w')
_IN_KV = ('attn/k/w', 'attn/v/w')
_NAMES = {
  'attn/q/w': 'attn/q_einsum/w',
  'attn/o/w': 'attn/attn_vec_einsum/w',
  'attn/q_norm/scale': 'attn/_query_norm/scale',
  'attn/k_norm/scale': 'attn/_key_norm/scale',
  'mlp/down/w': 'mlp/linear/w',
}


def _is_orbax(folder: Path) -> bool:
  return any((folder / name).is_file() for name in _MARKERS)


def _open_arrays(root: Path) -> dict[str, Any]:
  """TensorStore handles by name: 'layer_0/attn/q_einsum/w', ...

  Flat and nested names, and those of Orbax with and without OCDBT, differ in where
  they have '/' and '.'; as paths they are equal. TensorStore would read a missing
  block as zeros, so blocks are counted; that also reveals a size that the files do
  not have before anything is allocated for it.
  """
  import tensorstore as ts

  kvstore = {'driver': 'file', 'path': f'{root.absolute()}/'}
  if (root / 'manifest.ocdbt').is_file():
    kvstore = {'driver': 'ocdbt', 'base': f'file://{root.absolute()}/'}
  arrays, left_out = {}, []
  try:
    keys = [k.decode() for k in ts.KvStore.open(kvstore).result().list().result()]
    drivers = {
      stem: driver
      for stem, _, last in (key.rpartition('/') for key in keys)
      for driver, marker in _ARRAY_FILES.items()
      if last == marker
    }
    num_blocks = _count_blocks(drivers, keys)
    for stem, driver in drivers.items():
      path = stem.replace('.', '/').removeprefix('params/')
      path = path.removeprefix('transformer/')
      if re.fullmatch(r'layer_\d+/mlp/(gating_einsum|linear)', path):
        path += '/w'
      if vision := _VISION.match(path):
        left_out.append(vision[0])
        continue
      own = {**kvstore, 'path': kvstore.get('path', '') + f'{stem}/'}
      spec = {'driver': driver, 'kvstore': own}
      array = ts.open(spec, open=True).result()
      block = array.chunk_layout.write_chunk.shape
      wanted = math.prod(map(_ceil_div, array.shape, block))  # pyright: ignore[reportArgumentType]: no None in an open one
      if num_blocks[stem] != wanted:
        raise ValueError(f'array {path} has {num_blocks[stem]} of the {wanted} blocks of its shape')
      arrays[path] = array
  except ValueError as e:
    raise ValueError(f'{root}: this is not a complete Orbax checkpoint ({e}).') from None
  if not arrays:
    raise ValueError(f'{root}: this Orbax checkpoint holds no arrays.')
  base_source.log_left_out(str(root), left_out)
  return arrays


def _count_blocks(stems: Collection[str], keys: Iterable[str]) -> collections.Counter[str]:
  """How many keys, apart from the metadata, are below each array's stem."""
  counts = collections.Counter()
  for key in keys:
    folder, _, last = key.rpartition('/')
    while folder and folder not in stems:
      folder, _, _ = folder.rpartition('/')
    counts[folder] += last not in _ARRAY_FILES.values()
  return counts


def _ceil_div(size: int, block: int) -> int:
  return -(-size // block)


def _check(places: Mapping[str, Place], arrays: Mapping[str, Any], root: Path):
  """Checks that the arrays are exactly those that the places ask for."""
  shapes = {place.name: place.shape for place in places.values()}
  for name, shape in shapes.items():
    if name not in arrays:
      raise ValueError(f'{root}: array {name} is missing.')
    got = tuple(arrays[name].shape)
    if got != shape:
      raise ValueError(
        f'{root}: array {name} has shape {list(got)}, expected {list(shape)}, '
        'as the other arrays imply.'
      )
    kind = arrays[name].dtype.name
    if kind not in _DTYPES:
      raise ValueError(
        f'{root}: array {name} has dtype {kind}, expected one of {", ".join(_DTYPES)}.'
      )
  unexpected = sorted(arrays.keys() - shapes.keys())
  if unexpected:
    raise ValueError(
      f'{root}: array {unexpected[0]} is unexpected ({len(unexpected)} such arrays), '
      'expected only the weights of a Gemma language model.'
    )


class _Cache:
  """The leaves read last, as rows: a leaf is asked for in ranges."""

  def __init__(self, arrays: Mapping[str, Any], root: Path):
    self._arrays, self._root = arrays, root
    self._lock = threading.Lock()
    self._rows: dict[str, np.ndarray] = {}

  def read(
    self, path: str, place: Place, shape: tuple[int, ...], start: int, stop: int
  ) -> np.ndarray:
    with self._lock:
      if path not in self._rows:
        while len(self._rows) > 1:
          del self._rows[next(iter(self._rows))]
        self._rows[path] = self._load(path, place).reshape(shape)
      rows = self._rows[path]
    return rows[start:stop]

  def _load(self, path: str, place: Place) -> np.ndarray:
    array = self._arrays[place.name]
    if place.index is not None:
      array = array[place.index]
    try:
      leaf = place.view(array.read().result())
    except ValueError as e:
      raise ValueError(
        f'{self._root}: array {place.name} cannot be read; the checkpoint is '
        f'damaged or truncated ({str(e).splitlines()[0]}).'
      ) from None
    return base_source.stored_view(path, leaf)


def _tokenizer(path: Path):
  from gemma_jax.data import tokenizer

  if not path.is_file():
    return None
  return tokenizer.SentencePieceTokenizer.from_file(str(path))


def _trained_with(root: Path):
  from gemma_jax.formats.trained_with import TrainedWith

  return TrainedWith.read(root) or TrainedWith.read(root.parent)
