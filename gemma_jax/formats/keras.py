"""Reads the LoRA weights that Keras saves for a Gemma backbone (.lora.h5).

    lora/vars/rank              r
    lora/10/vars/lora_kernel_a  [N, D, r]    of layer 10 of the backbone
    lora/10/vars/lora_kernel_b  [r, H]

KerasHub's `save_lora_weights` numbers the backbone's layers that have weights,
as Keras flattens them: the embedding first, then each decoder block followed by
its sublayers, the last one first. Which projection a number stands for follows
from the architecture. Keras's scale is alpha / r with alpha = r, hence 1.
"""

from collections.abc import Iterator
import contextlib
from pathlib import Path
import re
from typing import Any

import ml_dtypes
import numpy as np

from gemma_jax import pytree
from gemma_jax.config.lora import TARGET_PRESETS, LoraConfig
from gemma_jax.formats import finite
from gemma_jax.model import adapter, layout
from gemma_jax.model.config import ModelConfig

_MAGIC = b'\x89HDF\r\n\x1a\n'
_FLOATS = ('float16', 'bfloat16', 'float32', 'float64')
_INTEGERS = ('int32', 'int64')

# What h5py raises for a damaged file, besides ValueError.
_DAMAGE = (OSError, KeyError, RuntimeError, TypeError)


def is_hdf5(path: Path) -> bool:
  """Whether there is a file that begins like HDF5."""
  if not path.is_file():
    return False
  with path.open('rb') as f:
    return f.read(len(_MAGIC)) == _MAGIC


def read_lora(
  path: Path, model_config: ModelConfig, scan_layers: bool = True
) -> tuple[LoraConfig, pytree.Tree]:
  """Reads a .lora.h5 file for a base of this architecture.

  Args:
    path: what `backbone.save_lora_weights` wrote.
    model_config: the base's architecture.
    scan_layers: leaves for all layers together (`layers/...` [L, ...]) or for each.

  Returns:
    (LoraConfig, factorization `keras`, scale 1; nested dicts of float32 NumPy
    arrays, e.g. layers/attn/q/lora_a [L, N, D, r], lora_b [L, r, H]).

  Raises:
    ValueError: h5py is not installed, the file is broken, or it was made for
      another architecture; names the file and the layer.
  """
  try:
    import h5py
  except ImportError:
    raise ValueError(
      f"{path}: reading it requires h5py, which is not installed; pip install -e '.[keras]'."
    ) from None
  try:
    with h5py.File(path, 'r') as file:
      rank, unrolled = _read(file, model_config, path.stat().st_size)
  except _DAMAGE as e:
    raise ValueError(
      f'{path}: it is damaged or holds no LoRA weights of a KerasHub backbone ({e}).'
    ) from None
  except ValueError as e:
    raise ValueError(f'{path}: {e}') from None

  targets = [
    target
    for target in layout.PROJECTION_EQUATIONS
    if any(f'layer_{i}/{target}/lora_a' in unrolled for i in range(model_config.num_layers))
  ]
  for i in range(model_config.num_layers):
    for target in targets:
      if f'layer_{i}/{target}/lora_a' not in unrolled:
        raise ValueError(
          f'{path}: layer_{i}/{target} has no factors, but other layers have; '
          f'expected them in all {model_config.num_layers} layers.'
        )
  tree = pytree.unflatten(unrolled)
  pattern = '|'.join(t.split('/')[1] for t in targets)
  presets = {value: name for name, value in TARGET_PRESETS.items()}
  config = LoraConfig(
    rank=rank,
    alpha=float(rank),
    targets=presets.get(pattern, pattern),
    factorization='keras',
    init='keras',
  )
  return config, layout.stack_layers(tree) if scan_layers else tree


def layer_names(config: ModelConfig) -> dict[int, str]:
  """Number in the file → projection, e.g. {8: 'layer_0/attn/v', ...}.

  Keras 3 flattens a block's sublayers from last to first. `None` marks those that
  carry no adapter here, including the block and its attention.
  """
  block: list[str | None] = [None, 'mlp/down', 'mlp/up', 'mlp/gate']
  block += [None] * (2 if config.use_post_norms else 1)  # (post), pre ffw norm
  block += [None, 'attn/o']
  block += [None] * (2 if config.use_qk_norm else 0)  # key norm, query norm
  block += ['attn/v', 'attn/k', 'attn/q']
  block += [None] * (2 if config.use_post_norms else 1)  # (post), pre attention
  return {
    1 + i * len(block) + j: f'layer_{i}/{name}'
    for i in range(config.num_layers)
    for j, name in enumerate(block)
    if name is not None
  }


def _read(
  file: Any, model_config: ModelConfig, num_bytes: int
) -> tuple[int, dict[str, np.ndarray]]:
  """The rank, and the factors by their paths in the unrolled tree.

  All are checked before any is read, and must fit into the file's `num_bytes`.
  """
  name = 'lora/vars/rank'
  with _naming(name):
    rank = int(_dataset(file, name, (), _INTEGERS)[()])
  if not 0 < rank < 1 << 16:
    raise ValueError(f'{name} is {rank}, expected 1 to {(1 << 16) - 1}.')
  datasets: dict[str, tuple[str, Any]] = {}
  for name, path, shape in _wanted(file['lora'], model_config, rank):
    with _naming(name):
      datasets[path] = name, _dataset(file, name, shape, _FLOATS)
  if not datasets:
    raise ValueError('it has no factors.')
  total = sum(dataset.nbytes for _, dataset in datasets.values())
  if total > num_bytes:
    raise ValueError(
      f"its factors are {total} bytes, expected at most the file's {num_bytes}; it is damaged."
    )
  unrolled = {}
  for path, (name, dataset) in datasets.items():
    with _naming(name):
      unrolled[path] = dataset[()].view(_dtype(dataset)).astype(np.float32)
    if (problem := finite.problem(unrolled[path], name)) is not None:
      raise ValueError(problem)
  return rank, unrolled


def _wanted(
  group: Any, model_config: ModelConfig, rank: int
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
  """For each factor: the dataset's name, the path of its leaf, its shape.

  Raises:
    ValueError: the group holds something other than projections; names it.
  """
  projections = layer_names(model_config)
  for key in group:
    if key == 'vars':
      continue
    # h5py returns names that are not UTF-8 as bytes.
    index = int(key) if re.fullmatch('[1-9][0-9]{0,5}', str(key)) else -1
    if index not in projections:
      raise ValueError(
        f'lora holds {key!r}, which is not a projection of a Gemma with '
        f'{model_config.num_layers} layers; the file is for another '
        'architecture.'
      )
    path = projections[index]
    shapes = _shapes(path.split('/', 1)[1], model_config, rank)
    for factor, shape in zip('ab', shapes, strict=True):
      name = f'lora/{key}/vars/lora_kernel_{factor}'
      yield name, f'{path}/lora_{factor}', shape


@contextlib.contextmanager
def _naming(name: str):
  """Turns exceptions of h5py into a ValueError that names the dataset."""
  try:
    yield
  except _DAMAGE as e:
    raise ValueError(f'{name} is damaged ({e}).') from None


def _dataset(file: Any, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> Any:
  """A dataset as Keras writes it: in this file, contiguous and complete.

  Links to elsewhere, chunks, filters and blocks that were never written are
  rejected: what is read is as large as what is stored.

  Raises:
    ValueError: the dataset is otherwise; names it.
  """
  import h5py

  node = file
  for part in name.split('/'):
    if not isinstance(node, h5py.Group):
      raise ValueError(f'{name} lies in a dataset, expected groups.')
    if not isinstance(node.get(part, getlink=True), h5py.HardLink):
      raise ValueError(f'{name} is missing or a link, expected a dataset.')
    node = node[part]
  dtype = _dtype(node) if isinstance(node, h5py.Dataset) else None
  if not isinstance(node, h5py.Dataset) or dtype is None or dtype.name not in dtypes:
    got = 'no dataset of numbers' if dtype is None else f'of {dtype.name}'
    raise ValueError(f'{name} is {got}, expected {" or ".join(dtypes)}.')
  if node.shape != shape:
    raise ValueError(
      f'{name} has shape {node.shape}, expected {shape}; the file is for another architecture.'
    )
  kind = node.id.get_create_plist().get_layout()
  if kind not in (h5py.h5d.COMPACT, h5py.h5d.CONTIGUOUS) or node.external:
    raise ValueError(
      f'{name} is stored in chunks or in another file, expected one contiguous block; '
      'save it again with Keras.'
    )
  stored = node.id.get_storage_size()
  if stored != node.nbytes:
    raise ValueError(f'{name} stores {stored} bytes, expected all {node.nbytes}.')
  return node


def _dtype(dataset: Any) -> np.dtype | None:
  """A dataset's dtype, None if NumPy has none; Keras marks its bfloat16."""
  try:
    dtype: np.dtype = dataset.dtype
  except (TypeError, ValueError):
    return None
  if dtype == 'V2' and str(dataset.attrs.get('dtype')) == 'bfloat16':
    return np.dtype(ml_dtypes.bfloat16)
  return dtype


def _shapes(target: str, config: ModelConfig, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Shapes of A and B of a projection, e.g. [N, D, r] and [r, H]."""
  sizes = layout.axis_sizes(config) | {'R': rank}
  axes = adapter.factor_axes(layout.PROJECTION_EQUATIONS[target], 'keras')
  a, b = (tuple(sizes[c] for c in letters) for letters in axes)
  return a, b
