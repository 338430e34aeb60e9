"""Files made to take far more memory or time than their size: 64 MiB and 4 times it.

Each of these took more once. The time is as in `worker`.
"""

import gzip
import json
import struct
import types

import pytest

from gemma_jax.data import tokenizer
from gemma_jax.formats import gguf_file, hf_safetensors, hf_tokenizer
from tests import data_toy
from tests.faults import corpora, worker

MIB = 1 << 20


def many(unit, num_bytes):
  return '[' + ','.join([unit] * (num_bytes // (len(unit) + 1))) + ']'


def adapter_option(option, text):
  """An adapter one of whose options has this JSON; how to read it."""

  def write(folder):
    corpora.CORPORA['adapter'].write(folder)
    path = folder / 'adapter' / 'adapter_config.json'
    raw = json.loads(path.read_text()) | {option: 'here'}
    path.write_text(json.dumps(raw).replace('"here"', text))

  return write, corpora.CORPORA['adapter'].read


def adapter_header(folder):
  """Tensors of no element."""
  corpora.CORPORA['adapter'].write(folder)
  entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
  header = '{' + ','.join(f'"{i}":{entry}' for i in range(200_000)) + '}'
  path = folder / 'adapter' / 'adapter_model.safetensors'
  path.write_bytes(struct.pack('<Q', len(header)) + header.encode())


def base_json(name):
  def write(folder):
    corpora.CORPORA['safetensors'].write(folder)
    (folder / name).write_text('{"a":' + many('[]', 6 * MIB) + '}')

  return write, corpora.CORPORA['safetensors'].read


def gguf_array(kind, item, num_bytes):
  """A metadata array that nothing reads."""

  def write(folder):
    corpora.CORPORA['gguf'].write(folder)
    path = folder / 'base.gguf'
    content = path.read_bytes()
    count = num_bytes // len(item)
    array = struct.pack('<Q4sIIQ', 4, b'junk', 9, kind, count) + item * count
    rest = struct.pack('<Q1sI', 1, b'z', 8)  # keeps the data aligned
    padding = -(len(array) + len(rest) + 8) % 32
    array += rest + struct.pack('<Q', padding) + bytes(padding)
    num_keys = struct.unpack('<Q', content[16:24])[0] + 2
    path.write_bytes(content[:16] + struct.pack('<Q', num_keys) + array + content[24:])

  return write, lambda folder: gguf_file.read_header(folder / 'base.gguf')


def pieces(unit):
  def write(folder):
    proto = tokenizer.build_model_proto(*data_toy.vocabulary())
    (folder / 'tokenizer.model').write_bytes(proto + unit * (4 * MIB // len(unit)))

  return write, corpora.CORPORA['tokenizer'].read


def large_vocabulary(folder):
  """As Gemma 3's tokenizer.json, of which the added tokens alone are read."""
  corpora.CORPORA['added_tokens'].write(folder)
  path = folder / 'tokenizer.json'
  merges = many('["a","b"]', 16 * MIB)
  path.write_text(path.read_text()[:-1] + f', "model": {{"merges": {merges}}}}}')


CASES = {
  'many values in an adapter_config.json': (
    *adapter_option('eva_config', many('[]', 6 * MIB)),
    'cannot be read as JSON',
  ),
  'many keys': (
    *adapter_option('eva_config', '{' + ','.join(f'"{i:x}":1' for i in range(10**6)) + '}'),
    'cannot be read as JSON',
  ),
  'a text that one character makes wide': (
    *adapter_option('eva_config', '"' + 'a' * 40 * MIB + '😀"'),
    'cannot be read as JSON',
  ),
  'a regex of many ways': (
    *adapter_option('target_modules', r'"([a-z_.0-9]|[a-z]+)+Q"'),
    'target_modules leaves out',
  ),
  'a key of many ways': (
    *adapter_option('rank_pattern', r'{"(([a-z_.0-9])+)+Q": 3}'),
    'matches no module',
  ),
  'a long regex': (*adapter_option('target_modules', f'"{"a?" * 10**6}"'), 'a regex of up to'),
  'many names': (*adapter_option('target_modules', many('"ab"', MIB)), 'a list of up to'),
  'a header of many tensors': (
    adapter_header,
    corpora.CORPORA['adapter'].read,
    'is not the JSON object',
  ),
  'config.json': (*base_json('config.json'), 'cannot be read as JSON'),
  'an index': (*base_json(hf_safetensors.INDEX_NAME), 'cannot be read as JSON'),
  'an array of numbers': (*gguf_array(2, b'\x07\x07', 8 * MIB), None),
  'an array of strings': (*gguf_array(8, struct.pack('<Q', 2) + b'ab', 28 * MIB), None),
  'empty pieces': (*pieces(b'\n\x00'), 'pieces or more, expected at most 524,288'),
  'small pieces': (*pieces(b'\n\x03\n\x01a'), 'pieces or more, expected at most 524,288'),
  'the vocabulary beside added tokens': (
    large_vocabulary,
    lambda folder: hf_tokenizer.added_tokens(folder, 400),
    None,
  ),
}


@pytest.mark.parametrize('name', CASES)
def test_a_reader_takes_memory_and_time_in_proportion_to_its_file(name, tmp_path):
  write, read, refusal = CASES[name]
  write(tmp_path)
  refused = []

  def read_once(folder):
    try:
      read(folder)
    except ValueError as e:
      refused.append(str(e))

  tried = worker.attempt(read_once, tmp_path, types.SimpleNamespace())
  assert tried.problem is None
  assert bool(refused) is (refusal is not None)
  if refused:
    assert refusal in refused[0]
    assert len(refused[0]) < 1000


def test_a_row_of_wide_characters_is_bounded_in_memory(tmp_path):
  """One character beyond 16 bits makes a text 4 times as wide, and each copy of it."""
  folder = tmp_path / 'records'
  folder.mkdir()
  watch = worker.Watch(folder)
  read = lambda folder: corpora.CORPORA['records'].read(folder)
  for kept, outcome in ((2_500_000, 'read'), (5_000_000, 'refused')):
    for wide in ('\U0001f600', '\\ud83d\\ude00'):
      row = f'{{"prompt": "{"a" * kept}{wide}", "response": "b"}}\n'
      (folder / 'a.jsonl.gz').write_bytes(gzip.compress(row.encode()))
      worker.attempt(read, folder, watch)  # what stays is not counted
      tried = worker.attempt(read, folder, watch)
      assert (tried.outcome, tried.problem) == (outcome, None), wide
