"""The .safetensors format, whole and damaged."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gemma_jax.formats import base_source, safetensors_file
from tests import hf_toy


def test_truncated_file_is_refused_wherever_it_ends(tmp_path):
  folder = hf_toy.write_folder(tmp_path / 't', hf_toy.OLD['gemma1'], hf_toy.tensors_of('gemma1'))
  file = folder / 'model.safetensors'
  whole = file.read_bytes()
  for size in (0, 3, 8, 9, 1009, len(whole) // 2, len(whole) - 1):
    file.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r'model\.safetensors: .*truncated'):
      hf_toy.open_folder(folder)
  file.write_bytes(whole + b'\0')
  with pytest.raises(ValueError, match='damaged'):
    hf_toy.open_folder(folder)


def with_header(header, data=b''):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return len(text).to_bytes(8, 'little') + text + data


@pytest.mark.parametrize(
  'content',
  [
    b'\xff' * 8 + b'{}',  # a header of 2^64 - 1 bytes
    with_header(b'[1, 2]'),
    with_header(b'{"a": '),
    with_header(b'[' * 100_000),
    with_header(b'\xff\xfe'),
    with_header({'a': 3}),
    with_header({'a': {'dtype': 'F32', 'shape': [1]}}),
    with_header(b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}'),
    # larger than the file
    with_header({'a': {'dtype': 'F32', 'shape': [10**12], 'data_offsets': [0, 4]}}, b'abcd'),
    with_header(
      {'a': {'dtype': 'F32', 'shape': [10**12], 'data_offsets': [0, 4 * 10**12]}}, b'abcd'
    ),
    # before the data, and backwards
    with_header({'a': {'dtype': 'F32', 'shape': [1], 'data_offsets': [-4, 0]}}),
    with_header({'a': {'dtype': 'F32', 'shape': [-1], 'data_offsets': [4, 0]}}, b'abcd'),
    # two tensors on the same bytes
    with_header(
      {
        'a': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]},
        'b': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]},
      },
      b'abcd',
    ),
    # a gap
    with_header({'a': {'dtype': 'F32', 'shape': [1], 'data_offsets': [4, 8]}}, b'abcdefgh'),
    with_header({'a': {'dtype': 'Q7', 'shape': [1], 'data_offsets': [0, 4]}}, b'abcd'),
  ],
)
def test_lying_header_is_refused_before_memory_is_taken(content, tmp_path):
  folder = hf_toy.write_folder(tmp_path / 'l', hf_toy.OLD['gemma1'], None)
  (folder / 'model.safetensors').write_bytes(content)
  with pytest.raises(ValueError, match=r'model\.safetensors: ') as e:
    hf_toy.open_folder(folder)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_written_file_is_what_the_package_reads(dtype, tmp_path, monkeypatch):
  """In ranges of rows, rounded once to nearest even."""
  monkeypatch.setattr('gemma_jax.formats.base_source.CHUNK_ELEMENTS', 3 * 11)
  rng = np.random.default_rng(0)
  arrays = {
    name: rng.standard_normal(shape, np.float32)
    for name, shape in {'b': (17, 11), 'a': (13,), 'c': (2, 11)}.items()
  }
  tensors = {
    name: base_source.StoredTensor(name, x.shape, lambda i, j, x=x: x[i:j])
    for name, x in arrays.items()
  }
  path = tmp_path / 'x.safetensors'
  safetensors_file.write(path, tensors, np.dtype(dtype))
  got = safetensors.numpy.load_file(path)
  assert got.keys() == arrays.keys()
  for name, x in arrays.items():
    assert got[name].dtype == dtype
    np.testing.assert_array_equal(got[name], x.astype(dtype), err_msg=name)
  entries = safetensors_file.read_header(path)
  assert list(entries) == ['b', 'a', 'c']
  assert entries['b'].offset % 8 == 0
