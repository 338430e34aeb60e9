"""Reads Gemma 1, 2 and 3 from a Hugging Face folder.

The folder holds config.json, the weights in one or several .safetensors files,
and tokenizer.model, which text records need. A multimodal Gemma 3 is read as the
language model in it: vision tensors are left out, and their number is said.

An `lm_head.weight` is accepted only if it equals the embedding, to which the
output layer is tied; one that differs is another model.
"""

from collections.abc import Iterable
import functools
from pathlib import Path
import re
from typing import Any

import ml_dtypes
import numpy as np

from gemma_jax import files as files_lib
from gemma_jax.formats import base_source, hf_config, safetensors_file
from gemma_jax.formats.base_source import BaseSource, StoredTensor
from gemma_jax.model import layout
from gemma_jax.model.config import ModelConfig

INDEX_NAME = 'model.safetensors.index.json'

# Projections by path in the layer. PEFT names its modules the same way.
MODULES = {
  'attn/q': 'self_attn.q_proj',
  'attn/k': 'self_attn.k_proj',
  'attn/v': 'self_attn.v_proj',
  'attn/o': 'self_attn.o_proj',
  'mlp/gate': 'mlp.gate_proj',
  'mlp/up': 'mlp.up_proj',
  'mlp/down': 'mlp.down_proj',
}

# Prefixes of the language model in multimodal checkpoints, old and new.
_PREFIXES = ('model.', 'language_model.model.', 'model.language_model.')
VISION = re.compile(r'(model\.)?(vision_tower|multi_modal_projector)\.')
# What stands beside weights that bitsandbytes, GPTQ, AWQ and others have quantized.
_QUANTIZED = re.compile(
  r'.*\.((nested_)?(absmax|quant_map)|quant_state\..*|SCB|qweight|qzeros|scales|g_idx'
  r'|weight_(packed|scale|scale_inv))'
)
_HEAD = re.compile(r'(language_model\.)?lm_head\.weight')


def open_folder(folder: Path, reference: str) -> BaseSource:
  """A Hugging Face folder as a base model; reads its headers only.

  Raises:
    ValueError: config.json or weights are missing or broken, the architecture
      is not Gemma's, a tensor is missing, unexpected, wrongly shaped or of an
      unknown dtype. Each message names the file and the tensor or field.
  """
  files = _weight_files(folder)
  entries: dict[str, safetensors_file.Entry] = {}
  for path in files:
    for name, entry in safetensors_file.read_header(path).items():
      if name in entries:
        raise ValueError(f'{path}: tensor {name} is also in {entries[name].path.name}.')
      entries[name] = entry
  config_path = folder / 'config.json'
  raw = read_json(config_path)
  _check_not_quantized(entries, raw, folder)
  config = hf_config.model_config(raw, len(entries), str(config_path))
  prefix = next((p for p in _PREFIXES if f'{p}embed_tokens.weight' in entries), 'model.')
  if prefix != 'model.':
    left_out = {name: match[0] for name in entries if (match := VISION.match(name))}
    entries = {n: e for n, e in entries.items() if n not in left_out}
    base_source.log_left_out(str(folder), left_out.values())
  heads = [entries.pop(name) for name in list(entries) if _HEAD.fullmatch(name)]
  stored = {n: StoredTensor(n, e.shape, e.read) for n, e in entries.items()}
  names = tensor_names(config, prefix)
  tensors = base_source.match_tensors(names, config, stored, str(folder))
  dtypes = {entry.dtype for entry in entries.values()}
  for head in heads:
    _check_tied(head, entries[names['embedder/input_embedding']])
  return BaseSource(
    reference=reference,
    config=config,
    stored_dtype=(
      np.dtype(ml_dtypes.bfloat16)
      if dtypes == {np.dtype(ml_dtypes.bfloat16)}
      else np.dtype(np.float32)
    ),
    tensors=tensors,
    files=files,
    make_tokenizer=functools.partial(_tokenizer, folder, config.vocab_size),
    read_chat_template=functools.partial(_chat_template, folder),
    read_stop_ids=functools.partial(_stop_ids, folder),
    read_trained_with=functools.partial(_trained_with, folder),
  )


def _check_not_quantized(names: Iterable[str], config: Any, folder: Path):
  """Raises ValueError if one of the tensors stands beside quantized weights."""
  name = next(filter(_QUANTIZED.fullmatch, names), None)
  if name is not None:
    about = config.get('quantization_config') if isinstance(config, dict) else None
    method = about.get('quant_method') if isinstance(about, dict) else None
    by = f' by {method}' if isinstance(method, str) else ''
    raise ValueError(
      f'{folder}: its weights are quantized{by} (tensor {name}), expected float32, float16 or '
      'bfloat16. Give the model that it was made from, or dequantize it first: '
      'AutoModelForCausalLM.from_pretrained(FOLDER).dequantize().save_pretrained(OUTPUT).'
    )


def read_json(path: Path) -> Any:
  """A parsed JSON file; ValueError names one that is missing or broken."""
  if not path.is_file():
    raise ValueError(f'{path}: there is no such file.')
  try:
    return files_lib.parse_json(path.read_bytes())
  except ValueError as e:
    raise ValueError(f'{path}: cannot be read as JSON ({e}).') from None


def tensor_names(config: ModelConfig, prefix: str = 'model.') -> dict[str, str]:
  """Names of the tensors by path in the unrolled tree."""
  in_layer = {f'{path}/w': name for path, name in MODULES.items()}
  in_layer['attn/q_norm/scale'] = 'self_attn.q_norm'
  in_layer['attn/k_norm/scale'] = 'self_attn.k_norm'
  in_layer['pre_attention_norm/scale'] = 'input_layernorm'
  if config.use_post_norms:
    in_layer['post_attention_norm/scale'] = 'post_attention_layernorm'
    in_layer['pre_ffw_norm/scale'] = 'pre_feedforward_layernorm'
    in_layer['post_ffw_norm/scale'] = 'post_feedforward_layernorm'
  else:
    # Gemma 1 kept Llama's name for the norm before the MLP.
    in_layer['pre_ffw_norm/scale'] = 'post_attention_layernorm'
  names = {
    'embedder/input_embedding': f'{prefix}embed_tokens.weight',
    'final_norm/scale': f'{prefix}norm.weight',
  }
  for i in range(config.num_layers):
    for path in layout.layer_axes(config):
      names[f'layer_{i}/{path}'] = f'{prefix}layers.{i}.{in_layer[path]}.weight'
  return names


def _weight_files(folder: Path) -> tuple[Path, ...]:
  """The folder's weights: one file, else those of the index, else all."""
  single, index = folder / 'model.safetensors', folder / INDEX_NAME
  if single.is_file():
    return (single,)
  if index.is_file():
    files = _index_files(index)
  else:
    files = sorted(folder.glob('*.safetensors'))
  if not files:
    raise ValueError(
      f'{folder}: there is a config.json but no .safetensors file; other '
      'forms of weights (.bin, .msgpack, .h5) are not supported.'
    )
  return tuple(files)


def _index_files(index: Path) -> list[Path]:
  raw = read_json(index)
  weight_map = raw.get('weight_map') if isinstance(raw, dict) else None
  if not isinstance(weight_map, dict):
    raise ValueError(f'{index}: there is no weight_map object in it.')
  files = []
  for name in sorted({str(entry) for entry in weight_map.values()}):
    if not re.fullmatch(r'[^/\\]+\.safetensors', name):
      raise ValueError(
        f'{index}: {name!r:.80} is not the name of a .safetensors file in the folder.'
      )
    path = index.parent / name
    if not path.is_file():
      of = next(t for t, entry in weight_map.items() if entry == name)
      raise ValueError(f'{path}: this shard is missing; {INDEX_NAME} says that it holds {of}.')
    files.append(path)
  return files


def _check_tied(head: safetensors_file.Entry, embedding: safetensors_file.Entry):
  """Raises ValueError unless an output layer equals the embedding."""
  equal = head.shape == embedding.shape
  step = max(1, base_source.CHUNK_ELEMENTS // embedding.shape[1])
  for start in range(0, embedding.shape[0] if equal else 0, step):
    stop = min(start + step, embedding.shape[0])
    equal = equal and np.array_equal(head.read(start, stop), embedding.read(start, stop))
  if not equal:
    raise ValueError(
      f'{head.path}: tensor {head.name} differs from {embedding.name}, but '
      "Gemma's output layer is tied to its embedding."
    )


def _tokenizer(folder: Path, num_rows: int):
  from gemma_jax.formats import hf_tokenizer

  return hf_tokenizer.read(folder, num_rows)


def _chat_template(folder: Path) -> str | None:
  from gemma_jax.formats import hf_tokenizer

  return hf_tokenizer.chat_template(folder)


def _stop_ids(folder: Path) -> tuple[int, ...]:
  from gemma_jax.formats import hf_tokenizer

  return hf_tokenizer.stop_ids(folder)


def _trained_with(folder: Path):
  from gemma_jax.formats import trained_with

  return trained_with.TrainedWith.read(folder)
