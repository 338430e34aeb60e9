"""The architecture of a Flax release, which stores arrays and nothing else.

Releases that `launch.convert` wrote record it (`conversion.json`). For a
downloaded release it follows from the shapes: a named variant that has them, or
else the settings that all sizes of the family share.
"""

import dataclasses
from pathlib import Path
import re
from typing import Any

from gemma_jax import files
from gemma_jax.formats import base_source, hf_writer
from gemma_jax.model import variants
from gemma_jax.model.config import ModelConfig

RECORD_NAME = 'conversion.json'

# Layers of the sizes whose settings differ from those of the variants here.
_GEMMA2_27B, _GEMMA3_4B, _GEMMA3_27B = 46, 34, 62


def model_config(shapes: dict[str, tuple[int, ...]], root: Path) -> ModelConfig:
  """The architecture that these arrays belong to.

  Args:
    shapes: by name, e.g. {'embedder/input_embedding': (256128, 2048), ...}.
    root: the Orbax folder; a record of the conversion is next to it.

  Raises:
    ValueError: an array that tells the sizes is missing or has the wrong number
      of axes; names it. Or shapes that are those of several different variants.
  """
  record = root.parent / RECORD_NAME
  if record.is_file():
    return _recorded(record, len(shapes))
  fields = _sizes(shapes, root)
  rows = fields.pop('vocab_size')
  like = {
    name: dataclasses.replace(variant, vocab_size=rows)
    for name, variant in variants.VARIANTS.items()
    if variant.vocab_size in (rows, hf_writer.TOKEN_ROWS.get(rows))
    and all(getattr(variant, field) == x for field, x in fields.items())
  }
  if len(set(like.values())) > 1:
    raise ValueError(
      f'{root}: has the shapes of {" and of ".join(like)}, expected {RECORD_NAME} beside it, which '
      'says the architecture; launch.convert writes it.'
    )
  for config in like.values():
    return config
  return ModelConfig(vocab_size=rows, **fields, **_family(fields))


def _recorded(record: Path, num_arrays: int) -> ModelConfig:
  try:
    fields = files.parse_json(record.read_bytes())['model_config']
    base_source.check_layer_count(fields['num_layers'], num_arrays, str(record))
    pattern = fields['layer_is_local']
    fields['layer_is_local'] = None if pattern is None else tuple(pattern)
    return ModelConfig(**fields)
  except (ValueError, TypeError, KeyError) as e:
    raise ValueError(
      f'{record}: model_config in it is not an architecture ({e}); write the '
      'folder again with launch.convert.'
    ) from None


def _sizes(shapes: dict[str, tuple[int, ...]], root: Path) -> dict[str, Any]:
  """The fields of `ModelConfig` that shapes and names tell."""

  def shape(name: str, num_axes: int) -> tuple[int, ...]:
    got = shapes.get(name)
    if got is None or len(got) != num_axes or 0 in got:
      state = 'missing' if got is None else f'of shape {list(got)}'
      raise ValueError(
        f'{root}: array {name} is {state}, expected {num_axes} axes; this is '
        'not a Flax release of Gemma.'
      )
    return got

  V, D = shape('embedder/input_embedding', 2)
  fused = 'layer_0/attn/qkv_einsum/w' in shapes
  if fused:
    _, N, _, H = shape('layer_0/attn/qkv_einsum/w', 4)
    K = N
  else:
    N, _, H = shape('layer_0/attn/q_einsum/w', 3)
    _, K, _, _ = shape('layer_0/attn/kv_einsum/w', 4)
  F, _ = shape('layer_0/mlp/linear/w', 2)
  layers = {int(m[1]) for n in shapes if (m := re.match(r'layer_(\d+)/', n))}
  base_source.check_layer_count(max(layers) + 1, len(shapes), str(root))
  return {
    'vocab_size': V,
    'embed_dim': D,
    'hidden_dim': F,
    'num_layers': max(layers) + 1,
    'num_heads': N,
    'num_kv_heads': K,
    'head_dim': H,
    'use_qk_norm': 'layer_0/attn/_query_norm/scale' in shapes,
    'use_post_norms': 'layer_0/post_ffw_norm/scale' in shapes,
  }


def _family(fields: dict[str, Any]) -> dict[str, Any]:
  """The settings that all sizes of a family share, and those its large ones change."""
  num_layers = fields['num_layers']
  if not fields['use_post_norms']:
    return {}
  rest: dict[str, Any] = {}
  if num_layers in (_GEMMA2_27B, _GEMMA3_27B):
    rest['query_scale'] = (fields['embed_dim'] / fields['num_heads']) ** -0.5
  if not fields['use_qk_norm']:
    return rest | {
      'layer_is_local': variants.alternating(num_layers, 1),
      'window_size': 4096,
      'attention_softcap': 50.0,
      'final_softcap': 30.0,
    }
  is_small = num_layers < _GEMMA3_4B
  return rest | {
    'layer_is_local': variants.alternating(num_layers, 5),
    'window_size': 512 if is_small else 1024,
    'rope_theta': 1_000_000.0,
    'rope_local_theta': 10_000.0,
    'rope_scale': 1.0 if is_small else 8.0,
    'max_positions': 32_768 if is_small else 131_072,
  }
