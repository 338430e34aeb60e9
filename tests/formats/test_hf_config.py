"""Both dialects of config.json, and what is refused."""

import pytest

from gemma_jax.formats import hf_config
from gemma_jax.model import variants
from gemma_jax.model.config import ModelConfig
from tests import hf_toy


@pytest.mark.parametrize('family', hf_toy.FAMILIES)
def test_both_dialects_mean_the_same(family, tmp_path):
  new = hf_toy.open_folder(hf_toy.PARITY / family)
  old = hf_toy.open_folder(
    hf_toy.write_folder(tmp_path / 'old', hf_toy.OLD[family], hf_toy.tensors_of(family))
  )
  assert new.config == hf_toy.CONFIGS[family]
  assert old.config == hf_toy.CONFIGS[family]
  hf_toy.assert_trees_equal(old.load_params(), new.load_params())


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
    ('gemma2', {'rope_scaling': {'type': 'linear', 'factor': 2}}, 'local layers is scaled'),
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
  folder = hf_toy.write_folder(
    tmp_path / 'bad', hf_toy.OLD[family] | change, hf_toy.tensors_of(family)
  )
  with pytest.raises(ValueError, match=message) as e:
    hf_toy.open_folder(folder)
  assert str(folder / 'config.json') in str(e.value)
  assert '\n' not in str(e.value)
