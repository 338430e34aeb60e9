"""Writes a base as a Hugging Face folder, streamed tensor by tensor.

    config.json                    both dialects (`hf_config.to_json`)
    generation_config.json         where sampling stops; the base's own, if any
    model.safetensors              or shards and model.safetensors.index.json
    tokenizer.model, ...           if the base has a tokenizer
    tokenizer_config.json          names its control and user-defined pieces,
                                   which llama.cpp's converter would otherwise
                                   take for plain ones
    chat_template.jinja            of the adapter's template, the base's own, or
                                   Gemma's turns (`chat_template`)

transformers loads it as GemmaForCausalLM, Gemma2ForCausalLM or
Gemma3ForCausalLM. The embedding's rows that only pad the Flax release (256128, of
which 256000 are tokens) are left out, as in the released folders; a row among them
that holds one of the base's own tokens stays.
"""

from collections.abc import Mapping
import dataclasses
import math
from pathlib import Path
import shutil
from typing import Any

import numpy as np

from gemma_jax import files
from gemma_jax.data.tokenizer import Tokenizer
from gemma_jax.formats import (
  base_source,
  chat_template,
  hf_config,
  hf_safetensors,
  hf_tokenizer,
  safetensors_file,
)
from gemma_jax.formats.base_source import BaseSource, StoredTensor
from gemma_jax.model.config import ModelConfig

MAX_SHARD_BYTES = 5_000_000_000

# Rows of the embedding in the Flax release of Gemma 1 and 2 → rows with a token;
# the others make the number divisible by 512.
TOKEN_ROWS = {256_128: 256_000}

# Tokenizer files of a Hugging Face folder, copied if the base has them.
_TOKENIZER_FILES = (
  'added_tokens.json',
  'chat_template.jinja',
  'chat_template.json',
  'special_tokens_map.json',
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
)

# What transformers is told about a tokenizer that has no files of its own.
_TOKENIZER_CONFIG = {
  'add_bos_token': True,
  'add_eos_token': False,
  'bos_token': '<bos>',
  'clean_up_tokenization_spaces': False,
  'eos_token': '<eos>',
  'pad_token': '<pad>',
  'tokenizer_class': 'GemmaTokenizer',
  'unk_token': '<unk>',
}


def write_folder(
  folder: Path,
  source: BaseSource,
  dtype: Any = 'auto',
  max_shard_bytes: int = MAX_SHARD_BYTES,
  trained_on: str | None = None,
):
  """Fills an empty folder; memory in use is a few megabytes.

  Wrap it in `atomic_folder.replace` to have the folder appear whole.

  Args:
    folder: exists and is empty.
    source: any base, also a merged one.
    dtype: 'auto' (the base's own), 'float32' or 'bfloat16'.
    max_shard_bytes: larger weights are split into several files, by whole tensors.
    trained_on: template of an adapter that was merged into the base.

  Raises:
    ValueError: transformers lacks the architecture, or the dtype is not one of these.
    OSError: the disk is full, or the base is no longer there.
  """
  dtype = base_source.weight_dtype(source, dtype)
  config = exported_config(source)
  raw = hf_config.to_json(config, dtype)
  _write_json(folder / 'config.json', raw)
  names = hf_safetensors.tensor_names(config)
  shapes = base_source.stored_shapes(config)
  tensors = {
    name: StoredTensor(name, shapes[path], source.tensors[path].read)
    for path, name in names.items()
  }
  _write_weights(folder, tensors, dtype, max_shard_bytes)
  write_tokenizer(folder, source, trained_on)
  _write_generation_config(folder / 'generation_config.json', source, trained_on)


def exported_config(source: BaseSource) -> ModelConfig:
  """The architecture without the rows that pad a Flax release.

  Rows up to that of the tokenizer's last token stay.
  """
  config = source.config
  if config.vocab_size not in TOKEN_ROWS:
    return config
  rows = TOKEN_ROWS[config.vocab_size]
  if (tokenizer := source.tokenizer()) is not None:
    rows = max(rows, tokenizer.vocab_size)
  return dataclasses.replace(config, vocab_size=rows)


def write_tokenizer(folder: Path, source: BaseSource, trained_on: str | None = None):
  """Writes tokenizer.model, along with the files that its readers need.

  Other tokenizer files of the base's own folder are copied, unless another
  tokenizer replaces it. Nothing is written for a base without SentencePiece.
  """
  tokenizer = source.tokenizer()
  if (origin := _origin(source)) is not None:
    for name in _TOKENIZER_FILES:
      if (origin / name).is_file():
        shutil.copyfile(origin / name, folder / name)
  if tokenizer is None or tokenizer.model_proto is None:
    return
  path = folder / 'tokenizer.model'
  if not path.is_file():
    path.write_bytes(tokenizer.model_proto)
  path = folder / hf_tokenizer.CONFIG_NAME
  given = hf_tokenizer.read_object(path)
  config = dict(given or _TOKENIZER_CONFIG)
  named = config.get('added_tokens_decoder') or {}
  config['added_tokens_decoder'] = {**_decoder(tokenizer), **named}
  template = chat_template.of_export(trained_on, source.read_chat_template(), tokenizer)
  if template is not None and template != hf_tokenizer.chat_template(folder):
    (folder / 'chat_template.json').unlink(missing_ok=True)
    (folder / 'chat_template.jinja').write_text(template, 'utf-8')
    config.pop('chat_template', None)  # llama.cpp prefers it to the file
  if config != given:
    _write_json(path, config)


def _decoder(tokenizer: Tokenizer) -> dict[str, Any]:
  """The entries by which transformers knows the pieces that merging does not produce."""
  return {
    str(piece.id): {
      'content': piece.content,
      'lstrip': False,
      'normalized': False,
      'rstrip': False,
      'single_word': False,
      'special': piece.special,
    }
    for piece in tokenizer.named_pieces
  }


def _write_generation_config(path: Path, source: BaseSource, trained_on: str | None):
  """Writes where sampling stops: as the base's folder says, and as was trained.

  Every template ends an answer with EOS, and chat with <end_of_turn> before it.
  """
  tokenizer = source.tokenizer()
  end_of_turn = None if tokenizer is None else tokenizer.end_of_turn_id
  origin = _origin(source)
  own = origin / path.name if origin is not None else path
  if not own.is_file():
    _write_json(
      path,
      {
        'bos_token_id': 2,
        'eos_token_id': 1 if end_of_turn is None else [1, end_of_turn],
        'pad_token_id': 0,
      },
    )
    return
  shutil.copyfile(own, path)
  config = hf_tokenizer.read_object(path)
  ids = list(hf_tokenizer.parse_stop_ids(config, own))
  learned = {None: (), 'chat': (1, end_of_turn)}.get(trained_on, (1,))
  missing = [i for i in learned if i not in ids]
  if missing:
    _write_json(path, {**config, 'eos_token_id': ids + missing})


def _origin(source: BaseSource) -> Path | None:
  """The Hugging Face folder of the base and of its tokenizer, if both are."""
  folder = source.files[0].parent if source.files else None
  if folder is None or not (folder / 'config.json').is_file():
    return None
  own = hf_tokenizer.read(folder, source.config.vocab_size)
  fingerprints = [None if t is None else t.fingerprint() for t in (own, source.tokenizer())]
  return folder if fingerprints[0] == fingerprints[1] else None


def _write_weights(
  folder: Path, tensors: Mapping[str, StoredTensor], dtype: np.dtype, max_shard_bytes: int
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
  text = files.to_json(value, path.name, indent=2, sort_keys=True)
  path.write_text(text + '\n', 'utf-8')
