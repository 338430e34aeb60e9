"""Writes a base as a Hugging Face folder, streamed tensor by tensor.

    config.json                    both dialects (`hf_config.to_json`)
    generation_config.json         where sampling stops; the base's own if any
    model.safetensors              or shards and model.safetensors.index.json
    tokenizer.model, ...           if the base has a tokenizer

transformers loads it as GemmaForCausalLM, Gemma2ForCausalLM or
Gemma3ForCausalLM. The embedding's rows that only pad the Flax release (256128,
of which 256000 are tokens) are left out, as in the released folders.
"""

from collections.abc import Mapping
import dataclasses
import json
import math
from pathlib import Path
import shutil
from typing import Any

import numpy as np

from gemma_jax.formats import base, hf_config, hf_safetensors, safetensors_file
from gemma_jax.formats.base import BaseSource, StoredTensor
from gemma_jax.model_config import ModelConfig

MAX_SHARD_BYTES = 5_000_000_000

# Rows of the embedding in the Flax release of Gemma 1 and 2 → those with a
# token; the others make the number divisible by 512.
TOKEN_ROWS = {256_128: 256_000}

# What transformers may want beside tokenizer.model; copied if the base has it.
_TOKENIZER_FILES = (
  'added_tokens.json',
  'chat_template.jinja',
  'special_tokens_map.json',
  'tokenizer.json',
  'tokenizer_config.json',
)


def write_folder(
  folder: Path,
  source: BaseSource,
  dtype: Any = 'auto',
  max_shard_bytes: int = MAX_SHARD_BYTES,
):
  """Fills an empty folder; memory in use is a few megabytes.

  Wrap it in `atomic_folder.replace` to have the folder appear whole.

  Args:
    folder: exists and is empty.
    source: any base, also a merged one.
    dtype: 'auto' (the base's own), 'float32' or 'bfloat16'.
    max_shard_bytes: weights beyond it go to several files, of whole tensors.

  Raises:
    ValueError: an architecture that transformers does not have, or a dtype.
    OSError: the disk is full, or the base went away.
  """
  dtype = base.weight_dtype(source, dtype)
  config = exported_config(source.config)
  raw = hf_config.to_json(config, dtype)
  _write_json(folder / 'config.json', raw)
  names = hf_safetensors.tensor_names(config)
  shapes = base.stored_shapes(config)
  tensors = {
    name: StoredTensor(name, shapes[path], source.tensors[path].read)
    for path, name in names.items()
  }
  _write_weights(folder, tensors, dtype, max_shard_bytes)
  write_tokenizer(folder, source)
  _write_generation_config(folder / 'generation_config.json', source)


def exported_config(config: ModelConfig) -> ModelConfig:
  """The architecture without the rows that pad a Flax release."""
  rows = TOKEN_ROWS.get(config.vocab_size, config.vocab_size)
  return dataclasses.replace(config, vocab_size=rows)


def write_tokenizer(folder: Path, source: BaseSource):
  """Writes tokenizer.model, and beside it what transformers wants.

  Other tokenizer files of the base's own folder are copied, unless another
  tokenizer replaces it. Nothing is written for a base without SentencePiece.
  """
  tokenizer = source.tokenizer()
  proto = None if tokenizer is None else tokenizer.model_proto
  if (origin := _origin(source)) is not None:
    for name in _TOKENIZER_FILES:
      if (origin / name).is_file():
        shutil.copyfile(origin / name, folder / name)
  if proto is None:
    return
  (folder / 'tokenizer.model').write_bytes(proto)
  if not (folder / 'tokenizer_config.json').is_file():
    _write_json(
      folder / 'tokenizer_config.json',
      {
        'add_bos_token': True,
        'add_eos_token': False,
        'bos_token': '<bos>',
        'clean_up_tokenization_spaces': False,
        'eos_token': '<eos>',
        'pad_token': '<pad>',
        'tokenizer_class': 'GemmaTokenizer',
        'unk_token': '<unk>',
      },
    )


def _write_generation_config(path: Path, source: BaseSource):
  """Copies that of the base's folder, or says where its tokenizer stops."""
  origin = _origin(source)
  if origin is not None and (origin / path.name).is_file():
    shutil.copyfile(origin / path.name, path)
    return
  tokenizer = source.tokenizer()
  end_of_turn = None if tokenizer is None else tokenizer.end_of_turn_id
  _write_json(
    path,
    {
      'bos_token_id': 2,
      'eos_token_id': 1 if end_of_turn is None else [1, end_of_turn],
      'pad_token_id': 0,
    },
  )


def _origin(source: BaseSource) -> Path | None:
  """The Hugging Face folder of the base and of its tokenizer, if both are."""
  folder = source.files[0].parent if source.files else None
  if folder is None or not (folder / 'config.json').is_file():
    return None
  tokenizer = source.tokenizer()
  proto = None if tokenizer is None else tokenizer.model_proto
  own = folder / 'tokenizer.model'
  is_own = own.read_bytes() == proto if own.is_file() else proto is None
  return folder if is_own else None


def _write_weights(
  folder: Path,
  tensors: Mapping[str, StoredTensor],
  dtype: np.dtype,
  max_shard_bytes: int,
):
  shards: list[dict[str, StoredTensor]] = [{}]
  shard_bytes = total_bytes = 0
  for name, tensor in tensors.items():
    num_bytes = math.prod(tensor.shape) * dtype.itemsize
    if shards[-1] and shard_bytes + num_bytes > max_shard_bytes:
      shards.append({})
      shard_bytes = 0
    shards[-1][name] = tensor
    shard_bytes += num_bytes
    total_bytes += num_bytes
  weight_map = {}
  for i, shard in enumerate(shards, 1):
    file = 'model.safetensors'
    if len(shards) > 1:
      file = f'model-{i:05}-of-{len(shards):05}.safetensors'
    safetensors_file.write(folder / file, shard, dtype)
    weight_map |= dict.fromkeys(shard, file)
  if len(shards) > 1:
    index = {
      'metadata': {'total_size': total_bytes},
      'weight_map': dict(sorted(weight_map.items())),
    }
    _write_json(folder / hf_safetensors.INDEX_NAME, index)


def _write_json(path: Path, value: Any):
  text = json.dumps(value, indent=2, sort_keys=True)
  path.write_text(text + '\n', 'utf-8')
