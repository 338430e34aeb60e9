"""Reads Gemma 1, 2 and 3 from a GGUF file, dequantized as it is streamed.

The file gives the sizes; what it does not give follows from its architecture, as
in llama.cpp: the pattern of local and global layers, the RoPE base of local
layers, and the query scale of the 27B models. Norm weights are stored as
1 + scale. All types that the `gguf` package dequantizes can be read.
"""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax.formats import base_source, gguf_file
from gemma_jax.formats.base_source import BaseSource, StoredTensor
from gemma_jax.model import layout, variants
from gemma_jax.model.config import ModelConfig

_EMBED = 'token_embd.weight'

# Tensors of one layer (`blk.i.NAME.weight`) by path in the layer.
_LAYER_NAMES = {
  'attn/q/w': 'attn_q',
  'attn/k/w': 'attn_k',
  'attn/v/w': 'attn_v',
  'attn/o/w': 'attn_output',
  'attn/q_norm/scale': 'attn_q_norm',
  'attn/k_norm/scale': 'attn_k_norm',
  'mlp/gate/w': 'ffn_gate',
  'mlp/up/w': 'ffn_up',
  'mlp/down/w': 'ffn_down',
  'pre_attention_norm/scale': 'attn_norm',
  'post_attention_norm/scale': 'post_attention_norm',
  'pre_ffw_norm/scale': 'ffn_norm',
  'post_ffw_norm/scale': 'post_ffw_norm',
}

# Layers of the 27B models, whose query scale is (D / N) ** -0.5.
_LAYERS_27B = {'gemma2': 46, 'gemma3': 62}


def open_gguf(path: Path, reference: str) -> BaseSource:
  """A GGUF file as a base model; reads its header only.

  Raises:
    ValueError: the file is not a Gemma 1, 2 or 3, truncated or split over several
      files, or a tensor is missing, unexpected, wrongly shaped or of a type that
      cannot be dequantized. Each message names the file and the tensor or key.
  """
  metadata, infos = gguf_file.read_header(path)
  if metadata.get('split.count', 1) not in (0, 1):
    raise ValueError(
      f'{path}: one of {metadata["split.count"]} parts, expected one complete '
      'file; join them with gguf-split --merge.'
    )
  if _EMBED not in infos:
    raise ValueError(f'{path}: tensor {_EMBED} is missing.')
  config = _model_config(metadata, infos, str(path))
  names = {'embedder/input_embedding': _EMBED, 'final_norm/scale': 'output_norm.weight'}
  for i in range(config.num_layers):
    for name in layout.layer_axes(config):
      names[f'layer_{i}/{name}'] = f'blk.{i}.{_LAYER_NAMES[name]}.weight'
  for name, info in infos.items():
    _check_type(info.type, name, path)
  stored = {
    name: StoredTensor(name, info.shape, functools.partial(_read_rows, path, info, name))
    for name, info in infos.items()
  }
  return BaseSource(
    reference=reference,
    config=config,
    stored_dtype=np.dtype(np.float32),
    tensors=base_source.match_tensors(names, config, stored, str(path)),
    files=(path,),
    make_tokenizer=functools.partial(_tokenizer, path),
    read_chat_template=functools.partial(_chat_template, path),
  )


def _model_config(
  metadata: dict[str, Any], infos: dict[str, gguf_file.TensorInfo], where: str
) -> ModelConfig:
  """The architecture that the metadata describes."""
  arch = metadata.get('general.architecture')
  if arch not in ('gemma', 'gemma2', 'gemma3'):
    raise ValueError(
      f'{where}: general.architecture is {arch!r:.80}, expected gemma, gemma2 or gemma3.'
    )

  def get(key: str, default: Any = None) -> Any:
    value = metadata.get(f'{arch}.{key}', default)
    if not isinstance(value, int | float) or isinstance(value, bool):
      raise ValueError(f'{where}: {arch}.{key} is {value!r:.80}, expected a number.')
    return value

  num_layers = get('block_count')
  base_source.check_layer_count(num_layers, len(infos), where)
  head_dim = get('attention.key_length')
  if get('attention.value_length', head_dim) != head_dim:
    raise ValueError(f'{where}: {arch}.attention.value_length is not key_length={head_dim}.')
  fields = {
    'vocab_size': infos[_EMBED].shape[0],
    'embed_dim': get('embedding_length'),
    'hidden_dim': get('feed_forward_length'),
    'num_layers': num_layers,
    'num_heads': get('attention.head_count'),
    'num_kv_heads': get('attention.head_count_kv'),
    'head_dim': head_dim,
    # Stored in float32; the shortest decimal is the intended value: 1e-06.
    'norm_eps': float(str(np.float32(get('attention.layer_norm_rms_epsilon')))),
    'max_positions': get('context_length'),
    'rope_theta': float(get('rope.freq_base', 10_000.0)),
    'rope_scale': _rope_scale(metadata, arch, where),
  }
  if arch != 'gemma':
    local = {'gemma2': 1, 'gemma3': 5}[arch]
    fields['layer_is_local'] = variants.alternating(num_layers, local)
    fields['use_post_norms'] = True
    if num_layers == _LAYERS_27B[arch]:
      fields['query_scale'] = (fields['embed_dim'] / fields['num_heads']) ** -0.5
  if arch == 'gemma2':
    # The first converters left these out; llama.cpp takes the same values.
    fields['window_size'] = get('attention.sliding_window', 4096)
    fields['attention_softcap'] = get('attn_logit_softcapping', 50.0)
    fields['final_softcap'] = get('final_logit_softcapping', 30.0)
  if arch == 'gemma3':
    fields['window_size'] = get('attention.sliding_window')
    fields['rope_theta'] = float(get('rope.freq_base'))
    fields['rope_local_theta'] = 10_000.0
    fields['use_qk_norm'] = True
  try:
    return ModelConfig(**fields)
  except ValueError as e:
    raise ValueError(f'{where}: {e}') from None


def _rope_scale(metadata: dict[str, Any], arch: str, where: str) -> float:
  kind = metadata.get(f'{arch}.rope.scaling.type', 'none')
  if kind == 'none':
    return 1.0
  factor = metadata.get(f'{arch}.rope.scaling.factor')
  # Only Gemma 3 keeps the positions of local layers unscaled.
  is_known = kind == 'linear' and arch != 'gemma2'
  if not is_known or not isinstance(factor, int | float) or not factor > 0:
    raise ValueError(
      f'{where}: {arch}.rope.scaling is {kind!r:.80} with factor {factor!r:.80}, '
      'expected none, or linear with a factor > 0 (not in gemma2).'
    )
  return float(factor)


def _check_type(kind: int, name: str, path: Path):
  if not _can_dequantize(kind):
    from gguf import GGMLQuantizationType

    raise ValueError(
      f'{path}: tensor {name} has type {GGMLQuantizationType(kind).name}, '
      'which the gguf package cannot dequantize; use another quantization.'
    )


@functools.cache
def _can_dequantize(kind: int) -> bool:
  from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

  block = np.zeros((1, GGML_QUANT_SIZES[GGMLQuantizationType(kind)][1]), np.uint8)
  try:
    quants.dequantize(block, GGMLQuantizationType(kind))
  except NotImplementedError:
    return False
  return True


def _read_rows(
  path: Path, info: gguf_file.TensorInfo, name: str, start: int, stop: int
) -> np.ndarray:
  """Rows [start, stop) of a tensor, dequantized to float32."""
  from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

  kind = GGMLQuantizationType(info.type)
  block, block_bytes = GGML_QUANT_SIZES[kind]
  row_elements = math.prod(info.shape[1:])
  first, size = start * row_elements, (stop - start) * row_elements
  stored = np.fromfile(
    path,
    np.uint8,
    count=size // block * block_bytes,
    offset=info.offset + first // block * block_bytes,
  )
  # As one row, which `dequantize` takes at once, not sixteen rows at a time.
  values = quants.dequantize(stored.reshape(1, -1), kind).reshape(stop - start, *info.shape[1:])
  return values - np.float32(1) if name.endswith('norm.weight') else values


def _chat_template(path: Path) -> str | None:
  metadata, _ = gguf_file.read_header(path)
  template = metadata.get('tokenizer.chat_template')
  return template if isinstance(template, str) else None


def _tokenizer(path: Path):
  """Rebuilds the tokenizer from the metadata; None if there is none."""
  from gemma_jax.data import tokenizer

  key = 'tokenizer.ggml'
  arrays = [f'{key}.{name}' for name in ('tokens', 'scores', 'token_type')]
  metadata, _ = gguf_file.read_header(path, arrays)
  if arrays[0] not in metadata:
    return None
  if metadata.get(f'{key}.model') != 'llama':
    raise ValueError(
      f'{path}: {key}.model is {metadata.get(f"{key}.model")!r:.80}, expected '
      "'llama', which is SentencePiece."
    )
  proto = tokenizer.build_model_proto(*(metadata.get(name, ()) for name in arrays))
  return tokenizer.SentencePieceTokenizer(proto, source=str(path))
