import dataclasses

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gemma_jax import pytree
from gemma_jax.formats import base_source, flax_release, flax_writer, open_base
from gemma_jax.model import layout, variants
from tests import hf_toy, logits_toy

# 7B's layout: as many kv heads as query heads, hence qkv_einsum.
MHA = dataclasses.replace(variants.TINY, num_kv_heads=4, max_positions=8192)
# Gemma 2 9B's layout: gate and up the other way round, known by its layers.
LARGE2 = dataclasses.replace(
  variants.TINY2,
  num_layers=42,
  layer_is_local=variants.alternating(42, 1),
  window_size=4096,
  attention_softcap=50.0,
  final_softcap=30.0,
  max_positions=8192,
)


def release_tree(config, params):
  """The release's arrays of an unrolled tree, spelt out here."""
  p = {name: np.asarray(x) for name, x in pytree.items(params)}
  gemma3 = config.use_qk_norm
  is_swapped = gemma3 or config == LARGE2
  tree = {
    'transformer/embedder': {'input_embedding': p['embedder/input_embedding']},
    'transformer/final_norm': {'scale': p['final_norm/scale']},
  }
  for i in range(config.num_layers):
    get = lambda name, i=i: p[f'layer_{i}/{name}']
    stem = f'transformer/layer_{i}'
    q, k, v = (get(f'attn/{n}/w') for n in 'qkv')
    if config.num_heads == config.num_kv_heads:
      tree[f'{stem}/attn/qkv_einsum'] = {'w': np.stack([q, k, v])}
    else:
      tree[f'{stem}/attn/q_einsum'] = {'w': q}
      tree[f'{stem}/attn/kv_einsum'] = {'w': np.stack([k, v])}
    tree[f'{stem}/attn/attn_vec_einsum'] = {'w': get('attn/o/w')}
    gating = np.stack([get('mlp/gate/w'), get('mlp/up/w')])
    if is_swapped:
      gating = np.ascontiguousarray(gating.swapaxes(1, 2))
    if gemma3:
      for n in 'qk':
        norm = 'query' if n == 'q' else 'key'
        tree[f'{stem}/attn/_{norm}_norm'] = {'scale': get(f'attn/{n}_norm/scale')}
    tree[f'{stem}/mlp/gating_einsum'] = {'w': gating}
    tree[f'{stem}/mlp/linear'] = {'w': get('mlp/down/w')}
    norms = ['pre_attention_norm', 'pre_ffw_norm']
    if config.use_post_norms:
      norms += ['post_attention_norm', 'post_ffw_norm']
    for norm in norms:
      tree[f'{stem}/{norm}'] = {'scale': get(f'{norm}/scale')}
  return tree


def nest(tree):
  return pytree.unflatten(
    {f'{module}/{n}': x for module, part in tree.items() for n, x in part.items()}
  )


def save(folder, tree, **kwargs):
  handler = ocp.PyTreeCheckpointHandler(**kwargs)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(tree))
  return folder


def open_folder(path):
  return flax_release.open_folder(path, str(path))


def params_of(config, dtype='float32', scan_layers=True):
  return logits_toy.source_of(config).load_params(dtype, scan_layers)


CONFIGS = {
  'gemma1': variants.TINY,
  'gemma1 7b': MHA,
  'gemma2': variants.TINY2,
  'gemma2 9b': LARGE2,
  'gemma3': variants.TINY3,
}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('nested', [False, True])
@pytest.mark.parametrize('name', CONFIGS)
def test_release_is_read(name, nested, dtype, tmp_path):
  config = CONFIGS[name]
  tree = release_tree(config, params_of(config, dtype, scan_layers=False))
  save(tmp_path / '2b', nest(tree) if nested else tree)
  for folder in (tmp_path, tmp_path / '2b'):
    base = open_folder(folder)
    assert base.config == config
    assert base.stored_dtype == (ml_dtypes.bfloat16 if dtype == 'bfloat16' else np.float32)
    hf_toy.assert_trees_equal(base.load_params(), params_of(config, dtype))


@pytest.mark.parametrize(
  'kwargs', [{'use_ocdbt': False}, {'use_zarr3': True}, {'use_compression': False}]
)
def test_all_forms_of_orbax_are_read(kwargs, tmp_path):
  tree = release_tree(variants.TINY2, params_of(variants.TINY2, scan_layers=False))
  for nested in (False, True):
    folder = tmp_path / str(nested) / 'x'
    save(folder, nest(tree) if nested else tree, **kwargs)
    hf_toy.assert_trees_equal(open_folder(folder).load_params(), params_of(variants.TINY2))


def test_mlp_without_a_w_and_a_params_level_are_read(tmp_path):
  """As the library's own modules name them."""
  tree = nest(release_tree(variants.TINY, params_of(variants.TINY, scan_layers=False)))
  for i in range(variants.TINY.num_layers):
    mlp = tree['transformer'][f'layer_{i}']['mlp']
    tree['transformer'][f'layer_{i}']['mlp'] = {k: x['w'] for k, x in mlp.items()}
  save(tmp_path / 'x', {'params': tree['transformer']})
  hf_toy.assert_trees_equal(open_folder(tmp_path / 'x').load_params(), params_of(variants.TINY))


def test_vision_is_left_out_and_said(tmp_path, caplog):
  tree = release_tree(variants.TINY3, params_of(variants.TINY3, scan_layers=False))
  tree['transformer/embedder']['mm_soft_embedding_norm'] = np.ones(5)
  tree['vision_encoder/siglip'] = {'w': np.ones((5, 7), np.float32)}
  save(tmp_path / 'x', tree)
  caplog.set_level('INFO')
  hf_toy.assert_trees_equal(open_folder(tmp_path / 'x').load_params(), params_of(variants.TINY3))
  assert 'language model: embedder/mm_* x 1, vision_encoder/* x 1' in caplog.text


@pytest.mark.parametrize('nested', [False, True])
@pytest.mark.parametrize('name', CONFIGS)
def test_what_is_written_is_the_release(name, nested, tmp_path):
  """Orbax itself restores the names and bits that the release would have."""
  config = CONFIGS[name]
  flax_writer.write_folder(tmp_path, logits_toy.source_of(config), 'bfloat16', nested)
  got = ocp.PyTreeCheckpointer().restore(tmp_path / flax_release.FOLDER_NAME)
  want = release_tree(config, params_of(config, 'bfloat16', scan_layers=False))
  hf_toy.assert_trees_equal(got, nest(want) if nested else want)
  if not nested:
    assert got.keys() == want.keys()
  base = open_folder(tmp_path)
  assert base.config == config
  hf_toy.assert_trees_equal(base.load_params(), params_of(config, 'bfloat16'))


def test_an_array_is_read_when_the_one_before_is_on_disk(tmp_path):
  source_ = logits_toy.source_of(variants.TINY)
  written, on_disk = [], []

  class Watched(base_source.BaseSource):
    def read_into(self, path, leaf, pool):
      files = [p for p in tmp_path.rglob('*') if p.is_file()]
      on_disk.append(sum(p.stat().st_size for p in files))
      written.append(leaf.nbytes)
      super().read_into(path, leaf, pool)

  flax_writer.write_folder(tmp_path, Watched(**vars(source_)))
  earlier = np.cumsum([0, *written])
  # k and v, and gate and up, are in one array: the second is read before the
  # first is written.
  assert sum(on_disk[1:] >= earlier[1:-1]) > len(written) / 2
  assert all(on_disk[2:] >= earlier[1:-2])


def test_what_cannot_be_read_is_said_in_its_own_words(tmp_path):
  source_ = logits_toy.source_of(variants.TINY)

  class Damaged(base_source.BaseSource):
    def read_into(self, path, leaf, pool):
      if path == 'layer_1/mlp/down/w':
        raise ValueError('the file is cut short')
      super().read_into(path, leaf, pool)

  with pytest.raises(ValueError, match=r'^the file is cut short$'):
    flax_writer.write_folder(tmp_path, Damaged(**vars(source_)))


def test_tokenizer_stands_beside_or_within(tmp_path):
  config = dataclasses.replace(variants.TINY, vocab_size=307)
  tree = release_tree(config, params_of(config, scan_layers=False))
  save(tmp_path / '2b', tree)
  assert open_folder(tmp_path).tokenizer() is None
  proto = logits_toy.tokenizer_proto()
  (tmp_path / 'tokenizer.model').write_bytes(proto)
  base = open_base.open_base(str(tmp_path))
  assert base.tokenizer().model_proto == proto
  assert open_base.open_base(str(tmp_path / '2b')).tokenizer().model_proto == proto
  out = tmp_path / 'out'
  out.mkdir()
  flax_writer.write_folder(out, base)
  assert (out / 'tokenizer.model').read_bytes() == proto


def test_one_model_among_several_is_not_guessed(tmp_path):
  tree = release_tree(variants.TINY, params_of(variants.TINY, scan_layers=False))
  save(tmp_path / '2b', tree)
  save(tmp_path / '2b-it', tree)
  with pytest.raises(ValueError, match=r'several models in it \(2b, 2b-it\)'):
    open_base.open_base(str(tmp_path))
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ValueError, match=r'without config\.json or Orbax'):
    open_base.open_base(str(tmp_path / 'empty'))


GATE = 'transformer/layer_1/mlp/gating_einsum'


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda t: t.pop(GATE), 'layer_1/mlp/gating_einsum/w is missing'),
    (lambda t: t.update(other={'w': np.ones(3)}), 'other/w is unexpected'),
    (
      lambda t: t[GATE].update(w=t[GATE]['w'][:, :31]),
      r'gating_einsum/w has shape \[2, 31, 46\], expected \[2, 34, 46\]',
    ),
    (
      lambda t: t[GATE].update(w=t[GATE]['w'].astype(np.float16)),
      'gating_einsum/w has dtype float16',
    ),
    (lambda t: t.pop('transformer/embedder'), 'embedder/input_embedding is missing'),
    (
      lambda t: t.update({'transformer/layer_77777777/x': {'w': np.ones(3)}}),
      'got 77777778 layers',
    ),
  ],
)
def test_arrays_are_exactly_those_expected(change, message, tmp_path):
  tree = release_tree(variants.TINY, params_of(variants.TINY, scan_layers=False))
  change(tree)
  save(tmp_path / 'bad', tree)
  with pytest.raises(ValueError, match=message) as e:
    open_folder(tmp_path / 'bad')
  assert str(tmp_path / 'bad') in str(e.value)
  assert '\n' not in str(e.value)


def test_damaged_checkpoint_is_named(tmp_path):
  (tmp_path / 'm').mkdir()
  flax_writer.write_folder(tmp_path / 'm', logits_toy.source_of(variants.TINY))
  data = max(
    (p for p in (tmp_path / 'm').rglob('*') if p.is_file()), key=lambda p: p.stat().st_size
  )
  whole = data.read_bytes()
  for content in (whole[: len(whole) // 2], None):
    data.unlink() if content is None else data.write_bytes(content)
    with pytest.raises(ValueError, match=r'm/params: .*(damaged|not a complete)') as e:
      open_folder(tmp_path / 'm').load_params()
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('use_zarr3', [False, True])
def test_block_that_is_missing_is_not_read_as_zeros(use_zarr3, tmp_path):
  config = variants.TINY
  tree = release_tree(config, params_of(config, scan_layers=False))
  folder = save(tmp_path / 'm', tree, use_ocdbt=False, use_zarr3=use_zarr3)
  blocks = [
    p for p in folder.rglob('*') if p.is_file() and 'q_einsum' in str(p) and p.name[0] in '0c'
  ]
  assert len(blocks) == config.num_layers
  blocks[0].unlink()
  with pytest.raises(ValueError, match=r'q_einsum/w has 0 of the 1 blo') as e:
    open_folder(folder)
  assert '\n' not in str(e.value)


def test_layers_of_the_tree_are_complete():
  """Every leaf has a place, and every place's array is filled by its leaves."""
  for config in CONFIGS.values():
    fused = config.num_heads == config.num_kv_heads
    places = flax_release.make_places(config, fused, config.use_qk_norm or config == LARGE2)
    assert places.keys() == layout.param_axes(config, False).keys()
    size = lambda s: int(np.prod(s))
    arrays = {p.name: p.shape for p in places.values()}
    assert sum(map(size, arrays.values())) == pytree.num_params(layout.abstract_params(config))
