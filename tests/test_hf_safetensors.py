import json
from pathlib import Path
import shutil

import jax
from jax.sharding import NamedSharding, PartitionSpec
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_jax import layout, pytree, variants
from gemma_jax.config import ModelConfig
from gemma_jax.formats import hf_config, hf_safetensors

PARITY = Path(__file__).parent / 'golden' / 'parity'
FAMILIES = ('gemma1', 'gemma2', 'gemma3')

TINY = {
  'vocab_size': 512,
  'embed_dim': 64,
  'hidden_dim': 128,
  'num_layers': 2,
  'num_heads': 4,
  'num_kv_heads': 1,
  'head_dim': 16,
  'max_positions': 256,
}
CONFIGS = {
  'gemma1': ModelConfig(**TINY),
  'gemma2': ModelConfig(
    **TINY | {'num_kv_heads': 2},
    query_scale=24**-0.5,
    layer_is_local=(True, False),
    window_size=8,
    use_post_norms=True,
    attention_softcap=5.0,
    final_softcap=3.0,
  ),
  'gemma3': ModelConfig(
    **TINY | {'num_layers': 3},
    query_scale=24**-0.5,
    layer_is_local=(True, True, False),
    window_size=8,
    rope_theta=1e6,
    rope_local_theta=1e4,
    rope_scale=8.0,
    use_qk_norm=True,
    use_post_norms=True,
  ),
}

# What the same models' config.json would say in the dialect of the releases.
OLD_SIZES = {
  'attention_bias': False,
  'head_dim': 16,
  'hidden_size': 64,
  'intermediate_size': 128,
  'max_position_embeddings': 256,
  'num_attention_heads': 4,
  'num_hidden_layers': 2,
  'num_key_value_heads': 1,
  'rms_norm_eps': 1e-6,
  'vocab_size': 512,
}
OLD = {
  'gemma1': OLD_SIZES
  | {
    'model_type': 'gemma',
    'hidden_act': 'gelu',
    'hidden_activation': None,
    'rope_scaling': None,
    'rope_theta': 10000.0,
  },
  'gemma2': OLD_SIZES
  | {
    'model_type': 'gemma2',
    'num_key_value_heads': 2,
    'hidden_act': 'gelu_pytorch_tanh',
    'hidden_activation': 'gelu_pytorch_tanh',
    'attn_logit_softcapping': 5.0,
    'final_logit_softcapping': 3.0,
    'query_pre_attn_scalar': 24,
    'rope_theta': 10000.0,
    'sliding_window': 8,
  },
  'gemma3': OLD_SIZES
  | {
    'model_type': 'gemma3_text',
    'num_hidden_layers': 3,
    'hidden_activation': 'gelu_pytorch_tanh',
    'attn_logit_softcapping': None,
    'final_logit_softcapping': None,
    'query_pre_attn_scalar': 24,
    'rope_local_base_freq': 10000,
    'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
    'rope_theta': 1000000,
    'sliding_window': 8,
    'sliding_window_pattern': 3,
  },
}


def config_json(family):
  return json.loads((PARITY / family / 'config.json').read_text())


def tensors_of(family):
  return load_file(PARITY / family / 'model.safetensors')


def write_folder(path, config, tensors):
  path.mkdir(exist_ok=True)
  (path / 'config.json').write_text(json.dumps(config))
  if tensors is not None:
    save_file(tensors, path / 'model.safetensors')
  return path


def open_folder(path):
  return hf_safetensors.open_folder(path, str(path))


def assert_trees_equal(got, want):
  got, want = dict(pytree.items(got)), dict(pytree.items(want))
  assert got.keys() == want.keys()
  for name, x in want.items():
    assert got[name].dtype == x.dtype, name
    np.testing.assert_array_equal(
      np.asarray(got[name]), np.asarray(x), err_msg=name
    )


@pytest.mark.parametrize('family', FAMILIES)
def test_each_value_comes_from_its_tensor(family):
  config = CONFIGS[family]
  D, N = config.embed_dim, config.num_heads
  K, H = config.num_kv_heads, config.head_dim
  file = tensors_of(family)
  source = open_folder(PARITY / family)
  params = dict(pytree.items(source.load_params(scan_layers=False)))

  want = {
    'embedder/input_embedding': file['model.embed_tokens.weight'],
    'final_norm/scale': file['model.norm.weight'],
  }
  for i in range(config.num_layers):
    get = lambda name, i=i: file[f'model.layers.{i}.{name}.weight']
    layer = {
      # x @ W.T with W [N H, D]: kernel[n, d, h] = W[n H + h, d].
      'attn/q/w': get('self_attn.q_proj').reshape(N, H, D).swapaxes(1, 2),
      'attn/k/w': get('self_attn.k_proj').reshape(K, H, D).swapaxes(1, 2),
      'attn/v/w': get('self_attn.v_proj').reshape(K, H, D).swapaxes(1, 2),
      'attn/o/w': get('self_attn.o_proj').T.reshape(N, H, D),
      'mlp/gate/w': get('mlp.gate_proj').T,
      'mlp/up/w': get('mlp.up_proj').T,
      'mlp/down/w': get('mlp.down_proj').T,
      'pre_attention_norm/scale': get('input_layernorm'),
    }
    if family == 'gemma1':  # named after the norm's place in Llama
      layer['pre_ffw_norm/scale'] = get('post_attention_layernorm')
    else:
      layer['post_attention_norm/scale'] = get('post_attention_layernorm')
      layer['pre_ffw_norm/scale'] = get('pre_feedforward_layernorm')
      layer['post_ffw_norm/scale'] = get('post_feedforward_layernorm')
    if family == 'gemma3':
      layer['attn/q_norm/scale'] = get('self_attn.q_norm')
      layer['attn/k_norm/scale'] = get('self_attn.k_norm')
    want |= {f'layer_{i}/{name}': x for name, x in layer.items()}

  assert params.keys() == want.keys()
  for name, x in want.items():
    np.testing.assert_array_equal(params[name], x, err_msg=name)
  sizes = json.loads((PARITY / family / 'meta.json').read_text())
  assert pytree.num_params(params) == sizes['params']


@pytest.mark.parametrize('family', FAMILIES)
def test_scanned_is_unrolled_stacked(family):
  source = open_folder(PARITY / family)
  scanned = source.load_params()
  unrolled = source.load_params(scan_layers=False)
  assert_trees_equal(scanned, layout.stack_layers(unrolled))
  shapes = layout.abstract_params(source.config)
  assert jax.tree.map(np.shape, scanned) == jax.tree.map(np.shape, shapes)


@pytest.mark.parametrize('family', FAMILIES)
def test_both_dialects_mean_the_same(family, tmp_path):
  new = open_folder(PARITY / family)
  old = open_folder(
    write_folder(tmp_path / 'old', OLD[family], tensors_of(family))
  )
  assert new.config == CONFIGS[family]
  assert old.config == CONFIGS[family]
  assert_trees_equal(old.load_params(), new.load_params())


def test_released_configs_are_the_variants():
  """The released config.json files, without what decides nothing."""
  gemma_2b = {
    'model_type': 'gemma',
    'head_dim': 256,
    'hidden_act': 'gelu',
    'hidden_size': 2048,
    'intermediate_size': 16384,
    'max_position_embeddings': 8192,
    'num_attention_heads': 8,
    'num_hidden_layers': 18,
    'num_key_value_heads': 1,
    'rms_norm_eps': 1e-06,
    'rope_scaling': None,
    'rope_theta': 10000.0,
    'vocab_size': 256000,
  }
  gemma2_2b = {
    'model_type': 'gemma2',
    'attn_logit_softcapping': 50.0,
    'final_logit_softcapping': 30.0,
    'head_dim': 256,
    'hidden_act': 'gelu_pytorch_tanh',
    'hidden_activation': 'gelu_pytorch_tanh',
    'hidden_size': 2304,
    'intermediate_size': 9216,
    'max_position_embeddings': 8192,
    'num_attention_heads': 8,
    'num_hidden_layers': 26,
    'num_key_value_heads': 4,
    'query_pre_attn_scalar': 256,
    'rms_norm_eps': 1e-06,
    'rope_theta': 10000.0,
    'sliding_window': 4096,
    'vocab_size': 256000,
  }
  gemma3_1b = {
    'model_type': 'gemma3_text',
    'attn_logit_softcapping': None,
    'final_logit_softcapping': None,
    'head_dim': 256,
    'hidden_activation': 'gelu_pytorch_tanh',
    'hidden_size': 1152,
    'intermediate_size': 6912,
    'max_position_embeddings': 32768,
    'num_attention_heads': 4,
    'num_hidden_layers': 26,
    'num_key_value_heads': 1,
    'query_pre_attn_scalar': 256,
    'rms_norm_eps': 1e-06,
    'rope_local_base_freq': 10000,
    'rope_scaling': None,
    'rope_theta': 1000000,
    'sliding_window': 512,
    'sliding_window_pattern': 6,
    'vocab_size': 262144,
  }
  gemma3_270m = gemma3_1b | {
    'hidden_size': 640,
    'intermediate_size': 2048,
    'num_hidden_layers': 18,
    '_sliding_window_pattern': 6,
    'layer_types': (['sliding_attention'] * 5 + ['full_attention']) * 3,
    'use_bidirectional_attention': False,
  }
  del gemma3_270m['sliding_window_pattern']
  read = lambda raw: hf_config.model_config(raw, 1000, 'config.json')
  assert read(gemma_2b) == variants.GEMMA_2B
  assert read(gemma2_2b) == variants.GEMMA2_2B
  assert read(gemma3_1b) == variants.GEMMA3_1B
  assert read(gemma3_270m) == variants.GEMMA3_270M


def test_text_config_of_a_multimodal_release():
  """Gemma 3 4B's text_config leaves most fields to the defaults."""
  raw = {
    'model_type': 'gemma3',
    'text_config': {
      'hidden_size': 2560,
      'intermediate_size': 10240,
      'model_type': 'gemma3_text',
      'num_hidden_layers': 34,
      'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
      'sliding_window': 1024,
    },
    'vision_config': {'hidden_size': 1152},
  }
  assert hf_config.model_config(raw, 1000, 'config.json') == ModelConfig(
    vocab_size=262_208,
    embed_dim=2560,
    hidden_dim=10_240,
    num_layers=34,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    layer_is_local=variants.alternating(34, 5),
    window_size=1024,
    rope_theta=1e6,
    rope_local_theta=1e4,
    rope_scale=8.0,
    use_qk_norm=True,
    use_post_norms=True,
    max_positions=131_072,
  )


@pytest.mark.parametrize(
  'prefix', ['language_model.model.', 'model.language_model.']
)
def test_language_model_of_a_multimodal_folder(prefix, tmp_path):
  raw = {'model_type': 'gemma3', 'text_config': OLD['gemma3']}
  tensors = {
    name.replace('model.', prefix, 1): x
    for name, x in tensors_of('gemma3').items()
  }
  tensors['vision_tower.vision_model.post_layernorm.weight'] = np.ones(
    7, np.float32
  )
  tensors['multi_modal_projector.mm_soft_emb_norm.weight'] = np.ones(
    5, np.float32
  )
  source = open_folder(write_folder(tmp_path / 'm', raw, tensors))
  want = open_folder(PARITY / 'gemma3')
  assert source.config == want.config
  assert_trees_equal(source.load_params(), want.load_params())


def write_shards(path, config, tensors, num_shards=3):
  """A sharded folder; returns its weight map."""
  write_folder(path, config, None)
  weight_map = {}
  for i in range(num_shards):
    file = f'model-{i + 1:05}-of-{num_shards:05}.safetensors'
    shard = {name: tensors[name] for name in sorted(tensors)[i::num_shards]}
    save_file(shard, path / file)
    weight_map |= dict.fromkeys(shard, file)
  index = {'metadata': {}, 'weight_map': weight_map}
  (path / hf_safetensors.INDEX_NAME).write_text(json.dumps(index))
  return weight_map


def test_shards_are_one_model(tmp_path):
  write_shards(tmp_path / 's', OLD['gemma2'], tensors_of('gemma2'))
  sharded = open_folder(tmp_path / 's')
  assert len(sharded.files) == 3
  single = open_folder(PARITY / 'gemma2')
  assert_trees_equal(sharded.load_params(), single.load_params())
  (tmp_path / 's' / hf_safetensors.INDEX_NAME).unlink()
  unlisted = open_folder(tmp_path / 's')
  assert_trees_equal(unlisted.load_params(), single.load_params())


def test_stored_dtype_is_kept_bit_for_bit(tmp_path):
  tensors = {
    name: x.astype(ml_dtypes.bfloat16)
    for name, x in tensors_of('gemma1').items()
  }
  source = open_folder(write_folder(tmp_path / 'b', OLD['gemma1'], tensors))
  assert source.stored_dtype == ml_dtypes.bfloat16
  params = source.load_params()
  assert {x.dtype for x in jax.tree.leaves(params)} == {source.stored_dtype}
  embedding = np.asarray(params['embedder']['input_embedding'])
  np.testing.assert_array_equal(embedding, tensors['model.embed_tokens.weight'])
  wide = source.load_params('float32')
  assert_trees_equal(wide, jax.tree.map(lambda x: x.astype(np.float32), params))
  # From float32, as from any other, bfloat16 is rounded to nearest even.
  narrow = open_folder(PARITY / 'gemma1').load_params('bfloat16')
  assert_trees_equal(narrow, params)


@pytest.mark.parametrize('narrow', [np.float16, ml_dtypes.bfloat16])
def test_mixed_or_float16_weights_are_read_as_float32(narrow, tmp_path):
  tensors = tensors_of('gemma1')
  name = 'model.layers.1.mlp.up_proj.weight'
  tensors[name] = tensors[name].astype(narrow)
  source = open_folder(write_folder(tmp_path / 'x', OLD['gemma1'], tensors))
  assert source.stored_dtype == np.float32
  up = source.load_params()['layers']['mlp']['up']['w']
  np.testing.assert_array_equal(up[1], tensors[name].T.astype(np.float32))


def test_leaves_go_to_their_shardings():
  mesh = jax.make_mesh(
      (len(jax.devices()),), ('fsdp',),
      axis_types=(jax.sharding.AxisType.Auto,),
  )  # fmt: skip
  source = open_folder(PARITY / 'gemma3')
  # 64 and 128, the first free axis that every count of fake devices divides.
  spec = {'embedder/input_embedding': PartitionSpec('fsdp', None)}
  shardings = pytree.map_with_name(
    lambda name, _: NamedSharding(mesh, spec.get(name, PartitionSpec())),
    layout.abstract_params(source.config),
  )
  params = source.load_params(shardings=shardings)
  for (name, x), (_, sharding) in zip(
    pytree.items(params), pytree.items(shardings), strict=True
  ):
    assert x.sharding == sharding, name
  assert_trees_equal(params, source.load_params())


def test_tied_head_is_accepted_and_another_is_not(tmp_path):
  tensors = tensors_of('gemma1')
  head = tensors['model.embed_tokens.weight'].copy()
  folder = write_folder(
    tmp_path / 'h', OLD['gemma1'], tensors | {'lm_head.weight': head}
  )
  want = open_folder(PARITY / 'gemma1').load_params()
  assert_trees_equal(open_folder(folder).load_params(), want)
  head[511, 63] += 1e-3
  write_folder(folder, OLD['gemma1'], tensors | {'lm_head.weight': head})
  with pytest.raises(ValueError, match=r'lm_head\.weight differs'):
    open_folder(folder)


Q1 = 'model.layers.1.self_attn.q_proj.weight'


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda t: t.pop(Q1), rf'{Q1} is missing'),
    (
      lambda t: t.update({'model.extra': t[Q1][:3]}),
      'model.extra is unexpected',
    ),
    (
      lambda t: t.update({Q1: t[Q1][:, :61]}),
      rf'{Q1} has shape \[64, 61\], expected \[64, 64\]',
    ),
    (
      lambda t: t.update({Q1: t[Q1].astype(np.int8)}),
      rf'{Q1} has dtype I8',
    ),
    (
      lambda t: t.update({'model.layers.2.input_layernorm.weight': t[Q1][0]}),
      r'layers\.2\.input_layernorm\.weight is unexpected',
    ),
  ],
)
def test_tensors_are_exactly_those_expected(change, message, tmp_path):
  tensors = tensors_of('gemma1')
  change(tensors)
  folder = write_folder(tmp_path / 'bad', OLD['gemma1'], tensors)
  with pytest.raises(ValueError, match=message) as e:
    open_folder(folder)
  assert str(folder) in str(e.value)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  ('family', 'change', 'message'),
  [
    ('gemma1', {'model_type': 'llama'}, "model_type is 'llama'"),
    ('gemma1', {'model_type': None}, 'model_type is None'),
    ('gemma1', {'hidden_activation': 'gelu'}, 'hidden_activation'),
    ('gemma1', {'hidden_act': 'silu'}, 'hidden_act'),
    ('gemma1', {'attention_bias': True}, 'attention_bias'),
    ('gemma1', {'tie_word_embeddings': False}, 'tie_word_embeddings'),
    ('gemma1', {'num_hidden_layers': 10**9}, '1000000000 layers'),
    ('gemma1', {'num_hidden_layers': '2'}, "'2' layers"),
    ('gemma1', {'hidden_size': None}, 'embed_dim: got None'),
    ('gemma1', {'num_attention_heads': 0}, 'num_heads: got 0'),
    ('gemma1', {'rope_theta': 0}, 'rope_theta is 0'),
    ('gemma1', {'rope_scaling': {'rope_type': 'yarn'}}, "'yarn'"),
    ('gemma1', {'rope_parameters': 7}, 'rope_parameters is 7'),
    (
      'gemma2',
      {'rope_scaling': {'type': 'linear', 'factor': 2}},
      'local layers is scaled',
    ),
    ('gemma2', {'layer_types': ['full_attention']}, 'layer_is_local'),
    ('gemma2', {'layer_types': ['chunked'] * 2}, 'layer_types'),
    ('gemma2', {'sliding_window': 0}, 'window_size'),
    ('gemma2', {'query_pre_attn_scalar': 'x'}, 'query_pre_attn_scalar'),
    ('gemma3', {'sliding_window_pattern': 0.5}, 'sliding_window_pattern'),
    ('gemma3', {'use_bidirectional_attention': True}, 'bidirectional'),
    ('gemma3', {'rope_parameters': {}}, 'full_attention'),
  ],
)
def test_other_configurations_are_refused(family, change, message, tmp_path):
  folder = write_folder(
    tmp_path / 'bad', OLD[family] | change, tensors_of(family)
  )
  with pytest.raises(ValueError, match=message) as e:
    open_folder(folder)
  assert str(folder / 'config.json') in str(e.value)
  assert '\n' not in str(e.value)


def test_config_and_weights_must_be_there(tmp_path):
  folder = write_folder(tmp_path / 'f', OLD['gemma1'], None)
  with pytest.raises(ValueError, match=r'no \.safetensors file'):
    open_folder(folder)
  save_file(tensors_of('gemma1'), folder / 'model.safetensors')
  (folder / 'config.json').write_text('{"model_type": "gemma",')
  with pytest.raises(ValueError, match=r'config\.json: this is no valid JSON'):
    open_folder(folder)
  (folder / 'config.json').unlink()
  with pytest.raises(ValueError, match=r'config\.json: there is no such file'):
    open_folder(folder)
  write_folder(folder, {'model_type': 'gemma', 'hidden_size': 64}, None)
  with pytest.raises(ValueError, match='field vocab_size is missing'):
    open_folder(folder)


def test_shard_or_index_that_is_wrong(tmp_path):
  folder = tmp_path / 's'
  weight_map = write_shards(folder, OLD['gemma1'], tensors_of('gemma1'))
  index = folder / hf_safetensors.INDEX_NAME
  second = folder / 'model-00002-of-00003.safetensors'
  first = folder / 'model-00001-of-00003.safetensors'

  shutil.move(second, tmp_path / 'elsewhere')
  with pytest.raises(ValueError, match=r'model-00002-of-00003\..*is missing'):
    open_folder(folder)
  shutil.copy(first, second)
  with pytest.raises(ValueError, match='is in model-00001-of-00003'):
    open_folder(folder)
  for name in ('../elsewhere', str(first), '..', 'a\\b.safetensors', '', 7):
    index.write_text(json.dumps({'weight_map': weight_map | {Q1: name}}))
    with pytest.raises(ValueError, match=r'is no name of a \.safet'):
      open_folder(folder)
  for text in ('[]', '{"weight_map": 3}', '{'):
    index.write_text(text)
    with pytest.raises(ValueError, match=r'index\.json'):
      open_folder(folder)


def test_truncated_file_is_refused_wherever_it_ends(tmp_path):
  folder = write_folder(tmp_path / 't', OLD['gemma1'], tensors_of('gemma1'))
  file = folder / 'model.safetensors'
  whole = file.read_bytes()
  for size in (0, 3, 8, 9, 1009, len(whole) // 2, len(whole) - 1):
    file.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r'model\.safetensors: .*truncated'):
      open_folder(folder)
  file.write_bytes(whole + b'\0')
  with pytest.raises(ValueError, match='damaged'):
    open_folder(folder)


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
    with_header(
      b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}'
    ),
    # larger than the file
    with_header(
      {'a': {'dtype': 'F32', 'shape': [10**12], 'data_offsets': [0, 4]}},
      b'abcd',
    ),
    with_header(
      {
        'a': {
          'dtype': 'F32',
          'shape': [10**12],
          'data_offsets': [0, 4 * 10**12],
        }
      },
      b'abcd',
    ),
    # before the data, and backwards
    with_header({'a': {'dtype': 'F32', 'shape': [1], 'data_offsets': [-4, 0]}}),
    with_header(
      {'a': {'dtype': 'F32', 'shape': [-1], 'data_offsets': [4, 0]}},
      b'abcd',
    ),
    # two tensors on the same bytes
    with_header(
      {
        'a': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]},
        'b': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]},
      },
      b'abcd',
    ),
    # a gap
    with_header(
      {'a': {'dtype': 'F32', 'shape': [1], 'data_offsets': [4, 8]}},
      b'abcdefgh',
    ),
    with_header(
      {'a': {'dtype': 'Q7', 'shape': [1], 'data_offsets': [0, 4]}},
      b'abcd',
    ),
  ],
)
def test_lying_header_is_refused_before_memory_is_taken(content, tmp_path):
  folder = write_folder(tmp_path / 'l', OLD['gemma1'], None)
  (folder / 'model.safetensors').write_bytes(content)
  with pytest.raises(ValueError, match=r'model\.safetensors: ') as e:
    open_folder(folder)
  assert '\n' not in str(e.value)
