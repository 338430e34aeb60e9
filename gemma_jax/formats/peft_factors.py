"""The factors in an adapter_model.safetensors, compared with a base."""

from pathlib import Path
import re
from typing import NamedTuple

import numpy as np

from gemma_jax.formats import base_source, finite, hf_safetensors, safetensors_file
from gemma_jax.model.config import ModelConfig

_PATHS = {module: path for path, module in hf_safetensors.MODULES.items()}

# The prefix of `layers` differs for adapters of multimodal checkpoints.
_TENSOR = re.compile(
  r'base_model\.model\.'
  r'(?P<module>(?:model\.|language_model\.model\.|model\.language_model\.)'
  r'layers\.(?P<layer>\d{1,6})\.(?P<name>\w+\.\w+))'
  r'\.lora_(?P<part>A\.weight|B\.weight|magnitude_vector)'
)
_VISION = re.compile(
  rf'base_model\.model\.(?P<module>(?P<prefix>{hf_safetensors.VISION.pattern}).+)\.lora_.+'
)


class Factors(NamedTuple):
  """A file's tensors for one module of the base.

  Attributes:
    module: its name in the base.
    a: [r, inputs].
    b: [outputs, r].
    magnitude: [outputs], or None without DoRA.
  """

  module: str
  a: np.ndarray
  b: np.ndarray
  magnitude: np.ndarray | None


def read_finite(entry: safetensors_file.Entry) -> np.ndarray:
  """A whole tensor; ValueError names one that is not finite."""
  values = entry.read_all()
  finite.check(values, entry.name, str(entry.path))
  return values


def read_factors(
  path: Path, config: ModelConfig
) -> tuple[dict[tuple[int, str], Factors], set[str]]:
  """The factors of each (layer, projection) in the file, in float32.

  Those of a vision tower are left out; the second is the names of its modules.
  """
  if not path.is_file():
    raise ValueError(
      f'{path}: there is no such file; an adapter in the older format (.bin) must '
      'be saved again as safetensors.'
    )
  by_module: dict[tuple[int, str], dict[str, np.ndarray]] = {}
  modules = {}
  vision = []
  shapes = base_source.stored_shapes(config)
  for tensor, entry in safetensors_file.read_header(path).items():
    if other := _VISION.fullmatch(tensor):
      vision.append(other)
      continue
    match = _TENSOR.fullmatch(tensor)
    if not match or match['name'] not in _PATHS:
      raise ValueError(
        f'{path}: tensor {tensor} is unexpected, expected lora_A and lora_B of {", ".join(_PATHS)}.'
      )
    name, layer = _PATHS[match['name']], int(match['layer'])
    if layer >= config.num_layers:
      raise ValueError(
        f'{path}: tensor {tensor} is for layer {layer}, but the base has '
        f'{config.num_layers}; the adapter belongs to another base.'
      )
    part = match['part'].removesuffix('.weight')
    outputs, inputs = shapes[f'layer_{layer}/{name}/w']
    expected, rank_axis = {
      'A': (['r', inputs], 0),
      'B': ([outputs, 'r'], 1),
      'magnitude_vector': ([outputs], None),
    }[part]
    got: list[int | str] = list(entry.shape)
    if rank_axis is not None and len(got) == 2 and got[rank_axis] > 0:
      got[rank_axis] = 'r'
    if got != expected:
      raise ValueError(
        f'{path}: tensor {tensor} has shape {list(entry.shape)}, expected '
        f'[{", ".join(map(str, expected))}]; the adapter belongs to another '
        'base.'
      )
    modules[layer, name] = match['module']
    parts = by_module.setdefault((layer, name), {})
    if part in parts:
      raise ValueError(f'{path}: tensor {tensor} occurs under two names.')
    parts[part] = read_finite(entry).astype(np.float32)
  factors = {}
  for key, parts in by_module.items():
    a, b = parts.get('A'), parts.get('B')
    if a is None or b is None or len(a) != b.shape[1]:
      raise ValueError(
        f'{path}: {modules[key]} needs lora_A and lora_B of one rank, got '
        f'{ {f: list(x.shape) for f, x in sorted(parts.items())} }.'
      )
    magnitude = parts.get('magnitude_vector')
    factors[key] = Factors(modules[key], a, b, magnitude)
  if not factors:
    what = 'has only those of a vision tower' if vision else 'has no tensors'
    raise ValueError(f'{path}: it {what}, expected factors of the language model.')
  base_source.log_left_out(str(path), (other['prefix'] for other in vision))
  return factors, {other['module'] for other in vision}
