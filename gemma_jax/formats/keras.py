"""Reads the LoRA weights that Keras saves for a Gemma backbone (.lora.h5).

    lora/vars/rank              r
    lora/10/vars/lora_kernel_a  [N, D, r]    of layer 10 of the backbone
    lora/10/vars/lora_kernel_b  [r, H]

KerasHub's `save_lora_weights` numbers the backbone's layers that have weights,
as Keras flattens them: the embedding first, then each decoder block followed by
its sublayers, the last one first. Which projection a number stands for follows
from the architecture. Keras's scale is alpha / r with alpha = r, hence 1.
"""

from pathlib import Path
import re
from typing import Any

import numpy as np

from gemma_jax import layout, lora, pytree
from gemma_jax.lora_config import TARGET_PRESETS, LoraConfig
from gemma_jax.model_config import ModelConfig

_MAGIC = b'\x89HDF\r\n\x1a\n'


def is_hdf5(path: Path) -> bool:
  """Whether there is a file that begins as HDF5 does."""
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
    scan_layers: leaves for all layers (`layers/...` [L, ...]) or for each.

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
      f'{path}: reading it takes h5py, which is not installed; '
      "pip install -e '.[keras]'."
    ) from None
  try:
    with h5py.File(path, 'r') as file:
      rank, unrolled = _read(file, model_config)
  except (OSError, KeyError, RuntimeError) as e:
    raise ValueError(
      f'{path}: it is damaged or holds no LoRA weights of a KerasHub backbone '
      f'({e}).'
    ) from None
  except ValueError as e:
    raise ValueError(f'{path}: {e}') from None

  targets = [
    target
    for target in layout.PROJECTION_EQUATIONS
    if any(f'layer_{i}/{target}/lora_a' in unrolled
           for i in range(model_config.num_layers))
  ]  # fmt: skip
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

  Keras 3 flattens a block's sublayers from the last to the first. `None` marks
  those that carry no adapter here, the block and its attention included.
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
  file: Any, model_config: ModelConfig
) -> tuple[int, dict[str, np.ndarray]]:
  """The rank, and the factors by their paths in the unrolled tree."""
  rank = int(_dataset(file, 'lora/vars/rank', (), 'iuf')[()])
  if not 0 < rank < 1 << 16:
    raise ValueError(f'lora/vars/rank is {rank}, expected a rank >= 1.')
  names = layer_names(model_config)
  unrolled: dict[str, np.ndarray] = {}
  for key in file['lora']:
    if key == 'vars':
      continue
    # h5py gives names that are no UTF-8 as bytes.
    index = int(key) if re.fullmatch('[0-9]{1,6}', str(key)) else -1
    if index not in names:
      raise ValueError(
        f'lora/{key} is no projection of a Gemma with '
        f'{model_config.num_layers} layers; the file is for another '
        'architecture.'
      )
    shapes = _shapes(names[index].split('/', 1)[1], model_config, rank)
    for factor, shape in zip('ab', shapes, strict=True):
      dataset = _dataset(
        file, f'lora/{key}/vars/lora_kernel_{factor}', shape, 'f'
      )
      unrolled[f'{names[index]}/lora_{factor}'] = np.asarray(
        dataset, np.float32
      )
  if not unrolled:
    raise ValueError('there are no factors in it.')
  return rank, unrolled


def _dataset(file: Any, name: str, shape: tuple[int, ...], kinds: str) -> Any:
  """A dataset that is what Keras writes: in this file, plain and whole.

  Links to elsewhere, filters and blocks that were never written are refused:
  what is read is as large as what is stored.

  Raises:
    ValueError: it is not; names it.
    KeyError: there is none.
  """
  import h5py

  group = file
  for part in name.split('/'):
    if not isinstance(group, h5py.Group):
      raise ValueError(f'{name} lies in a dataset, expected groups.')
    if not isinstance(group.get(part, getlink=True), h5py.HardLink):
      raise ValueError(f'{name} is missing or a link, expected a dataset.')
    group = group[part]
  if not isinstance(group, h5py.Dataset) or group.dtype.kind not in kinds:
    raise ValueError(f'{name} is no dataset of numbers, expected one.')
  if group.shape != shape:
    raise ValueError(
      f'{name} has shape {group.shape}, expected {shape}; the file is for '
      'another architecture.'
    )
  stored = group.id.get_storage_size()
  if group.is_virtual or group.external or stored != group.nbytes:
    raise ValueError(
      f'{name} stores {stored} bytes of its {group.nbytes} in the file, '
      'expected all of them, not compressed.'
    )
  return group


def _shapes(
  target: str, config: ModelConfig, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Shapes of A and B of a projection, e.g. [N, D, r] and [r, H]."""
  sizes = layout.axis_sizes(config) | {'R': rank}
  axes = lora.factor_axes(layout.PROJECTION_EQUATIONS[target], 'keras')
  return tuple(tuple(sizes[c] for c in letters) for letters in axes)
