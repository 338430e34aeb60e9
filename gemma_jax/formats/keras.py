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
      rank, kernels = _read(file, path)
  except (OSError, KeyError, RuntimeError) as e:
    raise ValueError(
      f'{path}: it is damaged or holds no LoRA weights of a KerasHub backbone '
      f'({e}).'
    ) from None

  names = layer_names(model_config)
  unrolled: dict[str, np.ndarray] = {}
  for index, (a, b) in sorted(kernels.items()):
    if index not in names:
      raise ValueError(
        f'{path}: layer {index} is no projection of a Gemma with '
        f'{model_config.num_layers} layers; the file is for another '
        'architecture.'
      )
    name = names[index]
    want = _shapes(name.split('/', 1)[1], model_config, rank)
    if (a.shape, b.shape) != want:
      raise ValueError(
        f'{path}: layer {index} has factors {a.shape} and {b.shape}, expected '
        f'{want[0]} and {want[1]} for {name}; the file is for another '
        'architecture.'
      )
    unrolled[f'{name}/lora_a'], unrolled[f'{name}/lora_b'] = a, b
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
  file: Any, path: Path
) -> tuple[int, dict[int, tuple[np.ndarray, np.ndarray]]]:
  """The rank, and the factors by the layer's number."""
  rank = int(file['lora/vars/rank'][()])
  if not 0 < rank < 1 << 16:
    raise ValueError(f'{path}: lora/vars/rank is {rank}, expected a rank >= 1.')
  kernels = {}
  for key in file['lora']:
    if key == 'vars':
      continue
    if not key.isdigit():
      raise ValueError(f'{path}: lora/{key} is unexpected, expected numbers.')
    group = file[f'lora/{key}/vars']
    kernels[int(key)] = tuple(
      np.asarray(group[f'lora_kernel_{factor}'], np.float32) for factor in 'ab'
    )
  if not kernels:
    raise ValueError(f'{path}: there are no factors in it.')
  return rank, kernels


def _shapes(
  target: str, config: ModelConfig, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Shapes of A and B of a projection, e.g. [N, D, r] and [r, H]."""
  sizes = layout.axis_sizes(config) | {'R': rank}
  axes = lora.factor_axes(layout.PROJECTION_EQUATIONS[target], 'keras')
  return tuple(tuple(sizes[c] for c in letters) for letters in axes)
