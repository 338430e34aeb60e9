"""Bases in memory and their logits, to test conversions with."""

import dataclasses
import functools
import zlib

import jax
import numpy as np

from gemma_jax.data import tokenizer as tokenizer_lib
from gemma_jax.formats import base_source
from gemma_jax.formats.base_source import BaseSource, StoredTensor
from gemma_jax.lora.lora import Lora
from gemma_jax.model.transformer import Transformer


def source_of(config, scale_of_norms=0.3) -> BaseSource:
  """Random float32 weights in every leaf, norm scales included."""
  tensors = {}
  for path, shape in base_source.stored_shapes(config).items():
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    values = rng.standard_normal(shape, np.float32)
    values *= scale_of_norms if len(shape) == 1 else shape[1] ** -0.5
    read = functools.partial(lambda x, i, j: x[i:j], values)
    tensors[path] = StoredTensor(path, shape, read)
  return BaseSource(
    reference='toy',
    config=config,
    stored_dtype=np.dtype(np.float32),
    tensors=tensors,
    files=(),
    make_tokenizer=lambda: None,
  )


def logits(config, params, tokens, lora: Lora | None = None) -> np.ndarray:
  """float32 [B, T, V] of the plain forward pass."""
  model = Transformer(config, remat='none')
  variables = {'params': params} if lora is None else lora.variables(params)

  @jax.jit
  def forward(variables, tokens):
    hidden = model.apply(variables, tokens)
    return model.apply(variables, hidden, method='logits')

  with jax.default_matmul_precision('highest'):
    return np.asarray(forward(variables, tokens))


def tokenizer_proto(num_letters=26) -> bytes:
  """A tiny SentencePiece model laid out as Gemma's."""
  letters = [chr(ord('a') + i) for i in range(num_letters)]
  control = ['<pad>', '<eos>', '<bos>', '<unk>', '<start_of_turn>']
  kinds = [tokenizer_lib.CONTROL] * 6
  kinds += [tokenizer_lib.BYTE] * 256
  kinds += [tokenizer_lib.NORMAL] * (num_letters + 1)
  spelled = [f'<0x{i:02X}>' for i in range(256)]
  pieces = [*control, '<end_of_turn>', *spelled, *letters, '\u2581']
  scores = [-float(i) for i in range(len(pieces))]
  return tokenizer_lib.build_model_proto(pieces, scores, kinds)


def make_tokenizer(proto: bytes) -> tokenizer_lib.Tokenizer:
  return tokenizer_lib.SentencePieceTokenizer(proto)


def cast(source: BaseSource, dtype) -> BaseSource:
  """The same base, stored in another dtype."""
  tensors = {
    path: StoredTensor(t.name, t.shape, lambda i, j, t=t: t.read(i, j).astype(dtype))
    for path, t in source.tensors.items()
  }
  return dataclasses.replace(source, tensors=tensors, stored_dtype=np.dtype(dtype))
