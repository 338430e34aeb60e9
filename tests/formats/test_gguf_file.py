"""Headers of GGUF files, whole and damaged."""

import struct

import numpy as np
import pytest

from gemma_jax.formats import gguf_file
from tests import gguf_toy


def test_truncated_file_is_refused_wherever_it_ends(tmp_path):
  path = gguf_toy.write(
    tmp_path / 't.gguf', 'gemma3', gguf_toy.GEMMA3, gguf_toy.make_tensors(gguf_toy.GEMMA3)
  )
  whole = path.read_bytes()
  for size in (4, 5, 23, 24, 101, 997, len(whole) // 2, len(whole) - 1):
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match='truncated') as e:
      gguf_toy.open_gguf(path)
    assert str(path) in str(e.value)
    assert '\n' not in str(e.value)
  path.write_bytes(b'')
  with pytest.raises(ValueError, match='truncated'):
    gguf_toy.open_gguf(path)


def test_wrong_magic_or_version_is_refused(tmp_path):
  path = gguf_toy.write(
    tmp_path / 'v.gguf', 'gemma', gguf_toy.GEMMA1, gguf_toy.make_tensors(gguf_toy.GEMMA1)
  )
  whole = path.read_bytes()
  for head in (b'GGML', b'GGUF' + struct.pack('<I', 1), b'GGUF\0\0\0\3'):
    path.write_bytes(head + whole[len(head) :])
    with pytest.raises(ValueError, match='not a GGUF file of a supported version'):
      gguf_toy.open_gguf(path)


def test_damaged_header_never_fails_otherwise(tmp_path):
  """Whatever bytes are flipped: it opens, or a ValueError names the file."""
  path = gguf_toy.write(
    tmp_path / 'd.gguf', 'gemma', gguf_toy.GEMMA1, gguf_toy.make_tensors(gguf_toy.GEMMA1)
  )
  whole = path.read_bytes()
  header = min(info.offset for info in gguf_file.read_header(path)[1].values())
  rng = np.random.default_rng(0)
  refused = 0
  for _ in range(300):
    damaged = bytearray(whole)
    for at in rng.integers(4, header, 3):
      damaged[at] = rng.integers(256)
    path.write_bytes(damaged)
    try:
      gguf_toy.open_gguf(path)
    except ValueError as e:
      refused += 1
      assert str(path) in str(e)
  assert refused > 100
