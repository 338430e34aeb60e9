"""Damages bytes, or the JSON in them, in ways that readers get wrong."""

import gzip
import json
import lzma
from typing import Any

import numpy as np

_NUMBERS = (
  0,
  1,
  127,
  128,
  255,
  2**15,
  2**16,
  2**31 - 1,
  2**31,
  2**32 - 1,
  2**32,
  2**62,
  2**63 - 1,
  2**63,
  2**64 - 1,
)

_VALUES = (
  None,
  True,
  False,
  0,
  1,
  -1,
  2**31,
  2**63,
  10**30,
  1.5,
  -0.0,
  1e308,
  float('inf'),
  float('nan'),
  '',
  'x',
  '\x00',
  '\ud800',
  '가',
  '../../etc/passwd',
  '/etc/passwd',
  '..',
  '.',
  'a/b',
  '(',
  '(a+)+$',
  '([a-z_.0-9]|[a-z]+)+Q',
  [],
  [1],
  [[]],
  {},
  {'a': 1},
  [2**62, 2**62],
  'F64',
  '__import__("os")',
  'x' * 5000,
)


def mutate(rng: np.random.Generator, content: bytes, name: str) -> bytes:
  """A damaged copy: one to four changes, each small.

  Args:
    rng: decides everything.
    content: of a file.
    name: of the file; .json and .jsonl are also changed as JSON, and so is
      the header of .safetensors.
  """
  for _ in range(int(rng.integers(1, 5))):
    changes = [_bytes]
    if name.endswith(('.json', '_METADATA', '.zarray')):
      changes.append(_json)
    elif name.endswith('.jsonl'):
      changes.append(_json_line)
    elif name.endswith('.safetensors'):
      changes.append(_safetensors)
    content = changes[int(rng.integers(len(changes)))](rng, content)
  return content


# What is small in a file and large in memory, as JSON.
_UNITS = ('[]', '{}', '{"":1}', '300', '"ab"', '1.5', '[[]]', '"\\ud83d\\ude00"')
_INFLATED_BYTES = 5 << 20  # as long as a row may be, nearly
_PACKED = {'.gz': gzip, '.xz': lzma}


def inflate(rng: np.random.Generator, content: bytes, name: str) -> bytes:
  """A copy with some megabytes more, so that what a reader makes of them can be seen.

  Args:
    rng: decides everything.
    content: of a file.
    name: of the file, as `mutate` takes it; what is packed is so again.
  """
  for suffix, packer in _PACKED.items():
    if name.endswith(suffix):
      inner = inflate(rng, packer.decompress(content), name.removesuffix(suffix))
      return packer.compress(inner)
  if name.endswith('.safetensors') and rng.random() < 0.8:
    size = int.from_bytes(content[:8], 'little')
    header = _inflated_json(rng, content[8 : 8 + size])
    return len(header).to_bytes(8, 'little') + header + content[8 + size :]
  if name.endswith('.jsonl'):
    lines = content.split(b'\n')
    i = int(rng.integers(len(lines) - 1))
    lines[i] = _inflated_json(rng, lines[i])
    return b'\n'.join(lines)
  if name.endswith(('.json', '_METADATA', '.zarray')) and rng.random() < 0.8:
    return _inflated_json(rng, content)
  at = int(rng.integers(min(len(content), 4096) + 1))
  unit = content[at : at + int(rng.integers(1, 32))] or b'\n'
  return content[:at] + unit * (_INFLATED_BYTES // len(unit)) + content[at:]


def _inflated_json(rng: np.random.Generator, content: bytes) -> bytes:
  """A JSON object with a large value more, or in place of another."""
  unit = _UNITS[int(rng.integers(len(_UNITS)))]
  count = _INFLATED_BYTES // (len(unit) + 1)
  kind = int(rng.integers(3))
  if kind == 0:  # many keys
    value = '{' + ','.join(f'"{i:x}":{unit}' for i in range(count // 2)) + '}'
  elif kind == 1:
    value = '[' + ','.join([unit] * count) + ']'
  else:  # one text
    value = '"' + 'a' * _INFLATED_BYTES + '\\ud83d\\ude00"'
  tree = json.loads(content)
  keys = [*tree, 'more'] if isinstance(tree, dict) else ['more']
  tree = dict(tree) if isinstance(tree, dict) else {}
  tree[keys[int(rng.integers(len(keys)))]] = '\x00here'
  return json.dumps(tree).replace('"\\u0000here"', value).encode()


def _bytes(rng: np.random.Generator, content: bytes) -> bytes:
  data = bytearray(content)
  # Headers are where the readers believe something.
  span = len(data) if rng.random() < 0.5 else min(len(data), 4096)
  at = int(rng.integers(span + 1))
  kind = int(rng.integers(8))
  if kind == 0 and data:
    data[min(at, len(data) - 1)] ^= 1 << int(rng.integers(8))
  elif kind == 1:
    size = int(rng.choice([1, 2, 4, 8]))
    number = _NUMBERS[int(rng.integers(len(_NUMBERS)))] % 2 ** (8 * size)
    data[at : at + size] = number.to_bytes(size, 'little')
  elif kind == 2:
    del data[at:]
  elif kind == 3:
    del data[at : at + int(rng.integers(1, 64))]
  elif kind == 4:
    data[at:at] = rng.bytes(int(rng.integers(1, 64)))
  elif kind == 5:
    data[at:at] = data[at : at + int(rng.integers(1, 256))]
  elif kind == 6:
    other = int(rng.integers(len(data) + 1))
    size = int(rng.integers(1, 64))
    data[at : at + size] = data[other : other + size]
  else:
    size = int(rng.integers(1, 16))
    data[at : at + size] = rng.bytes(size)
  return bytes(data)


def _json(rng: np.random.Generator, content: bytes) -> bytes:
  try:
    tree = json.loads(content)
  except (ValueError, RecursionError):
    return _bytes(rng, content)
  if rng.random() < 0.02:
    return b'[' * 100_000
  # Lone surrogates pass as escapes.
  return json.dumps(_change(rng, tree)).encode()


def _json_line(rng: np.random.Generator, content: bytes) -> bytes:
  lines = content.split(b'\n')
  i = int(rng.integers(len(lines)))
  lines[i] = _json(rng, lines[i])
  return b'\n'.join(lines)


def _safetensors(rng: np.random.Generator, content: bytes) -> bytes:
  """Changes the header as JSON; its size stays right."""
  size = int.from_bytes(content[:8], 'little')
  if size > len(content) - 8:
    return _bytes(rng, content)
  header = _json(rng, content[8 : 8 + size])
  return len(header).to_bytes(8, 'little') + header + content[8 + size :]


def _change(rng: np.random.Generator, tree: Any) -> Any:
  """The tree with one node replaced, dropped, doubled or renamed."""
  if isinstance(tree, dict) and tree and rng.random() < 0.9:
    key = list(tree)[int(rng.integers(len(tree)))]
    tree = dict(tree)
    kind = rng.random()
    if kind < 0.6:
      tree[key] = _change(rng, tree[key])
    elif kind < 0.75:
      del tree[key]
    else:
      tree[str(_pick(rng))] = tree.pop(key) if kind < 0.9 else tree[key]
    return tree
  if isinstance(tree, list) and tree and rng.random() < 0.8:
    i = int(rng.integers(len(tree)))
    kind = rng.random()
    if kind < 0.6:
      return [*tree[:i], _change(rng, tree[i]), *tree[i + 1 :]]
    return [*tree[:i], *tree[i + 1 :]] if kind < 0.8 else [*tree, tree[i]]
  return _pick(rng)


def _pick(rng: np.random.Generator) -> Any:
  return _VALUES[int(rng.integers(len(_VALUES)))]
