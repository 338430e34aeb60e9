"""Hugging Face folders, single and sharded, whole and damaged."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma_jax import pytree
from gemma_jax.formats import hf_safetensors
from tests import hf_toy


@pytest.mark.parametrize('family', hf_toy.FAMILIES)
def test_each_value_comes_from_its_tensor(family):
  config = hf_toy.CONFIGS[family]
  D, N = config.embed_dim, config.num_heads
  K, H = config.num_kv_heads, config.head_dim
  file = hf_toy.tensors_of(family)
  source = hf_toy.open_folder(hf_toy.PARITY / family)
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
  sizes = json.loads((hf_toy.PARITY / family / 'meta.json').read_text())
  assert pytree.num_params(params) == sizes['params']


@pytest.mark.parametrize('prefix', ['language_model.model.', 'model.language_model.'])
def test_language_model_of_a_multimodal_folder(prefix, tmp_path, caplog):
  raw = {'model_type': 'gemma3', 'text_config': hf_toy.OLD['gemma3']}
  tensors = {
    name.replace('model.', prefix, 1): x for name, x in hf_toy.tensors_of('gemma3').items()
  }
  tensors['vision_tower.vision_model.post_layernorm.weight'] = np.ones(7, np.float32)
  tensors['multi_modal_projector.mm_soft_emb_norm.weight'] = np.ones(5, np.float32)
  tensors['vision_tower.vision_model.post_layernorm.bias'] = np.ones(7, np.float32)
  caplog.set_level('INFO')
  source = hf_toy.open_folder(hf_toy.write_folder(tmp_path / 'm', raw, tensors))
  words = (
    'leaves out what is not of the language model: multi_modal_projector.* x 1, vision_tower.*'
  )
  assert f'{words} x 2' in caplog.text
  want = hf_toy.open_folder(hf_toy.PARITY / 'gemma3')
  assert source.config == want.config
  hf_toy.assert_trees_equal(source.load_params(), want.load_params())


@pytest.mark.parametrize(
  ('suffix', 'config', 'by'),
  [
    ('.absmax', {'quant_method': 'bitsandbytes'}, ' by bitsandbytes'),
    ('.quant_state.bitsandbytes__nf4', None, ''),
    ('_scale', {'quant_method': 7}, ''),
  ],
)
def test_quantized_weights_are_named_as_that(suffix, config, by, tmp_path):
  tensors = hf_toy.tensors_of('gemma1')
  tensors[f'model.layers.0.mlp.up_proj.weight{suffix}'] = np.ones(7, np.float32)
  raw = hf_toy.OLD['gemma1'] | {'quantization_config': config}
  folder = hf_toy.write_folder(tmp_path / 'q', raw, tensors)
  words = rf'weights are quantized{by} \(tensor .*up_proj\.weight{suffix}\).*\.dequantize\(\)'
  with pytest.raises(ValueError, match=words):
    hf_toy.open_folder(folder)


def write_shards(path, config, tensors, num_shards=3):
  """A sharded folder; returns its weight map."""
  hf_toy.write_folder(path, config, None)
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
  write_shards(tmp_path / 's', hf_toy.OLD['gemma2'], hf_toy.tensors_of('gemma2'))
  sharded = hf_toy.open_folder(tmp_path / 's')
  assert len(sharded.files) == 3
  single = hf_toy.open_folder(hf_toy.PARITY / 'gemma2')
  hf_toy.assert_trees_equal(sharded.load_params(), single.load_params())
  (tmp_path / 's' / hf_safetensors.INDEX_NAME).unlink()
  unlisted = hf_toy.open_folder(tmp_path / 's')
  hf_toy.assert_trees_equal(unlisted.load_params(), single.load_params())


def test_tied_head_is_accepted_and_another_is_not(tmp_path):
  tensors = hf_toy.tensors_of('gemma1')
  head = tensors['model.embed_tokens.weight'].copy()
  folder = hf_toy.write_folder(
    tmp_path / 'h', hf_toy.OLD['gemma1'], tensors | {'lm_head.weight': head}
  )
  want = hf_toy.open_folder(hf_toy.PARITY / 'gemma1').load_params()
  hf_toy.assert_trees_equal(hf_toy.open_folder(folder).load_params(), want)
  head[511, 63] += 1e-3
  hf_toy.write_folder(folder, hf_toy.OLD['gemma1'], tensors | {'lm_head.weight': head})
  with pytest.raises(ValueError, match=r'lm_head\.weight differs'):
    hf_toy.open_folder(folder)


Q1 = 'model.layers.1.self_attn.q_proj.weight'


def test_config_and_weights_must_be_there(tmp_path):
  folder = hf_toy.write_folder(tmp_path / 'f', hf_toy.OLD['gemma1'], None)
  with pytest.raises(ValueError, match=r'no \.safetensors file'):
    hf_toy.open_folder(folder)
  save_file(hf_toy.tensors_of('gemma1'), folder / 'model.safetensors')
  (folder / 'config.json').write_text('{"model_type": "gemma",')
  with pytest.raises(ValueError, match=r'config\.json: cannot be read as JSON'):
    hf_toy.open_folder(folder)
  (folder / 'config.json').unlink()
  with pytest.raises(ValueError, match=r'config\.json: there is no such file'):
    hf_toy.open_folder(folder)
  hf_toy.write_folder(folder, {'model_type': 'gemma', 'hidden_size': 64}, None)
  with pytest.raises(ValueError, match='field vocab_size is missing'):
    hf_toy.open_folder(folder)


def test_shard_or_index_that_is_wrong(tmp_path):
  folder = tmp_path / 's'
  weight_map = write_shards(folder, hf_toy.OLD['gemma1'], hf_toy.tensors_of('gemma1'))
  index = folder / hf_safetensors.INDEX_NAME
  second = folder / 'model-00002-of-00003.safetensors'
  first = folder / 'model-00001-of-00003.safetensors'

  shutil.move(second, tmp_path / 'elsewhere')
  with pytest.raises(ValueError, match=r'model-00002-of-00003\..*is missing'):
    hf_toy.open_folder(folder)
  shutil.copy(first, second)
  with pytest.raises(ValueError, match='is also in model-00001-of-00003'):
    hf_toy.open_folder(folder)
  for name in ('../elsewhere', str(first), '..', 'a\\b.safetensors', '', 7):
    index.write_text(json.dumps({'weight_map': weight_map | {Q1: name}}))
    with pytest.raises(ValueError, match=r'is not the name of a \.safet'):
      hf_toy.open_folder(folder)
  for text in ('[]', '{"weight_map": 3}', '{'):
    index.write_text(text)
    with pytest.raises(ValueError, match=r'index\.json'):
      hf_toy.open_folder(folder)
