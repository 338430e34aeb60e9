"""A tiny SentencePiece vocabulary, and the real records where they are."""

import json
from pathlib import Path

import pytest

from gemma_jax.data import forms
from gemma_jax.data import tokenizer as tokenizer_lib

# Real records lie beside the repository; none of them is part of it.
SHARED_DATA = Path(__file__).parents[2] / 'shared' / 'data'

CONTROL = ('<pad>', '<eos>', '<bos>', '<unk>', '<unused0>')
TURNS = ('<start_of_turn>', '<end_of_turn>')
RUNS = ('\n', '\n\n', '  ', '   ')
WORDS = ('▁', 'a', 'b', 'H', 'i', 'u', 's', 'e', 'r', 'ab', '▁a', 'Hi', 'us', 'er', 'user', '가')


def vocabulary(turn_type=tokenizer_lib.CONTROL, runs=RUNS, words=WORDS):
  """(pieces, scores, types) as a GGUF file holds them."""
  bytes_ = [f'<0x{i:02X}>' for i in range(256)]
  pieces = [*CONTROL, *TURNS, *runs, *bytes_, *words]
  types = (
    [tokenizer_lib.CONTROL] * len(CONTROL)
    + [turn_type] * len(TURNS)
    + [tokenizer_lib.USER_DEFINED] * len(runs)
    + [tokenizer_lib.BYTE] * len(bytes_)
    + [tokenizer_lib.NORMAL] * len(words)
  )
  scores = [-float(i) for i in range(len(pieces))]
  return pieces, scores, types


def make_tokenizer(**kwargs):
  """A SentencePieceTokenizer of `vocabulary`."""
  proto = tokenizer_lib.build_model_proto(*vocabulary(**kwargs))
  return tokenizer_lib.SentencePieceTokenizer(proto)


def shared_file(name):
  """Path of a real data file; skips the test where it is absent."""
  path = SHARED_DATA / name
  if not path.is_file():
    pytest.skip(f'{path} is not there')
  return str(path)


def records(rows, template='dolly'):
  """What rows of any form become."""
  return [forms.parse(row, template) for row in rows]


def write_jsonl(path, rows):
  """Writes a row a line; a str is written as it is."""
  lines = (r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows)
  path.write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')
  return str(path)
