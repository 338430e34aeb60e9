"""Stored tensors to the parameter tree: forms, dtypes, shardings, refusals."""

import dataclasses
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_jax import pytree
from gemma_jax.config.train import MeshConfig
from gemma_jax.formats import base_source, open_base
from gemma_jax.formats.base_source import StoredTensor, chunk_rows
from gemma_jax.formats.parts import Part
from gemma_jax.model import layout, variants
from gemma_jax.model.config import ModelConfig
from gemma_jax.training import sharding as sharding_lib
from tests import gguf_toy, hf_toy


@pytest.mark.parametrize('family', hf_toy.FAMILIES)
def test_scanned_is_unrolled_stacked(family):
  base = hf_toy.open_folder(hf_toy.PARITY / family)
  scanned = base.load_params()
  unrolled = base.load_params(scan_layers=False)
  hf_toy.assert_trees_equal(scanned, layout.stack_layers(unrolled))
  shapes = layout.abstract_params(base.config)
  assert jax.tree.map(np.shape, scanned) == jax.tree.map(np.shape, shapes)


def test_stored_dtype_is_kept_bit_for_bit(tmp_path):
  tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in hf_toy.tensors_of('gemma1').items()}
  base = hf_toy.open_folder(hf_toy.write_folder(tmp_path / 'b', hf_toy.OLD['gemma1'], tensors))
  assert base.stored_dtype == ml_dtypes.bfloat16
  params = base.load_params()
  assert {x.dtype for x in jax.tree.leaves(params)} == {base.stored_dtype}
  embedding = np.asarray(params['embedder']['input_embedding'])
  np.testing.assert_array_equal(embedding, tensors['model.embed_tokens.weight'])
  wide = base.load_params('float32')
  hf_toy.assert_trees_equal(wide, jax.tree.map(lambda x: x.astype(np.float32), params))
  # From float32, as from any other, bfloat16 is rounded to nearest even.
  narrow = hf_toy.open_folder(hf_toy.PARITY / 'gemma1').load_params('bfloat16')
  hf_toy.assert_trees_equal(narrow, params)


@pytest.mark.parametrize('narrow', [np.float16, ml_dtypes.bfloat16])
def test_mixed_or_float16_weights_are_read_as_float32(narrow, tmp_path):
  tensors = hf_toy.tensors_of('gemma1')
  name = 'model.layers.1.mlp.up_proj.weight'
  tensors[name] = tensors[name].astype(narrow)
  base = hf_toy.open_folder(hf_toy.write_folder(tmp_path / 'x', hf_toy.OLD['gemma1'], tensors))
  assert base.stored_dtype == np.float32
  up = base.load_params()['layers']['mlp']['up']['w']
  np.testing.assert_array_equal(up[1], tensors[name].T.astype(np.float32))


@pytest.mark.parametrize('scan_layers', [True, False])
@pytest.mark.parametrize('sizes', [(2, 2, 2), (1, 8, 1), (1, 2, 4)])
def test_leaves_go_to_their_shardings(sizes, scan_layers):
  mesh = sharding_lib.make_mesh(MeshConfig(*sizes))
  base = hf_toy.open_folder(hf_toy.PARITY / 'gemma3')
  abstract = {'params': layout.abstract_params(base.config, scan_layers=scan_layers)}
  shardings = sharding_lib.tree_shardings(abstract, base.config, mesh)['params']
  params = base.load_params(shardings=shardings, scan_layers=scan_layers)
  for (name, x), (_, sharding) in zip(pytree.items(params), pytree.items(shardings), strict=True):
    assert x.sharding == sharding, name
  hf_toy.assert_trees_equal(params, base.load_params(scan_layers=scan_layers))


def test_rows_that_no_device_here_holds_are_not_read():
  """As on a pod, each of whose hosts has a part of every leaf."""
  V, D = 524_289, 16
  table = np.arange(V * D, dtype=np.float32).reshape(V, D)
  asked = []

  def read(start, stop):
    asked.append(stop - start)
    return table[start:stop]

  path = 'embedder/input_embedding'
  base = dataclasses.replace(
    hf_toy.open_folder(hf_toy.PARITY / 'gemma1'), tensors={path: StoredTensor(path, (V, D), read)}
  )
  out = np.zeros((V // 4, D), np.float32)
  part = Part(((V // 2, V // 2 + V // 4), (0, D)), out)
  for job in base.jobs(path, (V, D), [part]):
    job()
  np.testing.assert_array_equal(out, table[V // 2 : V // 2 + V // 4])
  assert sum(asked) <= V // 4 + 2 * chunk_rows((V, D)) < V


Q1 = 'model.layers.1.self_attn.q_proj.weight'


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda t: t.pop(Q1), rf'{Q1} is missing'),
    (lambda t: t.update({'model.extra': t[Q1][:3]}), 'model.extra is unexpected'),
    (lambda t: t.update({Q1: t[Q1][:, :61]}), rf'{Q1} has shape \[64, 61\], expected \[64, 64\]'),
    (lambda t: t.update({Q1: t[Q1].astype(np.int8)}), rf'{Q1} has dtype I8'),
    (
      lambda t: t.update({'model.layers.2.input_layernorm.weight': t[Q1][0]}),
      r'layers\.2\.input_layernorm\.weight is unexpected',
    ),
  ],
)
def test_tensors_are_exactly_those_expected(change, message, tmp_path):
  tensors = hf_toy.tensors_of('gemma1')
  change(tensors)
  folder = hf_toy.write_folder(tmp_path / 'bad', hf_toy.OLD['gemma1'], tensors)
  with pytest.raises(ValueError, match=message) as e:
    hf_toy.open_folder(folder)
  assert str(folder) in str(e.value)
  assert '\n' not in str(e.value)


def test_chunks_of_rows_join(tmp_path, monkeypatch):
  """Dequantizing 3 rows at a time gives what one piece gives."""
  tensors = gguf_toy.make_tensors(gguf_toy.GEMMA3)
  kinds = {name: gguf_toy.Q8_0 for name, x in tensors.items() if x.ndim == 2}
  base = gguf_toy.open_gguf(
    gguf_toy.write(tmp_path / 'm.gguf', 'gemma3', gguf_toy.GEMMA3, tensors, kinds)
  )
  whole = base.load_params()
  monkeypatch.setattr('gemma_jax.formats.base_source.CHUNK_ELEMENTS', 3 * 64)
  jax.tree.map(np.testing.assert_array_equal, base.load_params(), whole)


def test_fingerprint_knows_the_weights_and_not_the_path(tmp_path):
  copy = shutil.copytree(hf_toy.PARITY / 'gemma1', tmp_path / 'copy')
  mark = open_base.open_base(str(hf_toy.PARITY / 'gemma1')).fingerprint()
  assert len(mark) == 64
  assert open_base.open_base(str(copy)).fingerprint() == mark

  tensors = load_file(copy / 'model.safetensors')
  tensors['model.layers.1.mlp.down_proj.weight'][3, 5] += 1
  save_file(tensors, copy / 'model.safetensors')
  changed = open_base.open_base(str(copy)).fingerprint()
  others = [
    open_base.open_base(reference).fingerprint()
    for reference in (str(hf_toy.PARITY / 'gemma2'), 'random:tiny', 'random:tiny2')
  ]
  assert len({mark, changed, *others}) == 5
  assert open_base.open_base('random:tiny').fingerprint() == others[1]


def test_fingerprint_of_the_architecture_counts():
  base = open_base.open_base(str(hf_toy.PARITY / 'gemma1'))
  config = dataclasses.replace(base.config, rope_theta=9973.0)
  other = dataclasses.replace(base, config=config)
  assert other.fingerprint() != base.fingerprint()


def test_fingerprint_is_that_of_earlier_versions():
  """What was trained goes on, whatever fields architectures get."""
  base = open_base.open_base('random:tiny3')
  mark = base.fingerprint()
  assert mark == '8b15cb57d1ae8eeb027ec7bb6c911c37dfd32cbf83ef8f096540d98738aaee9b'

  @dataclasses.dataclass(frozen=True)
  class Later(ModelConfig):
    use_new_norm: bool = False

  config = Later(**dataclasses.asdict(base.config))
  assert dataclasses.replace(base, config=config).fingerprint() == mark
  config = dataclasses.replace(config, use_new_norm=True)
  assert dataclasses.replace(base, config=config).fingerprint() != mark
  for variant in variants.VARIANTS:
    config = variants.get(variant)
    assert base_source._described(config) == repr(config)


def test_fingerprint_samples_large_files_evenly(tmp_path):
  """A file of 40 MB: a change at its ends or over a 1/128 of it is seen."""
  base = open_base.open_base('random:tiny')
  path = tmp_path / 'large'
  content = bytearray(np.random.default_rng(0).bytes(40_000_003))
  path.write_bytes(content)
  large = dataclasses.replace(base, files=(path,))
  mark = large.fingerprint()
  size = len(content)
  for start, stop in ((0, 1), (size - 1, size), (size // 3, size // 3 + size // 128)):
    changed = bytearray(content)
    changed[start:stop] = bytes(b ^ 1 for b in changed[start:stop])
    path.write_bytes(changed)
    assert large.fingerprint() != mark
  path.write_bytes(content)
  assert large.fingerprint() == mark
