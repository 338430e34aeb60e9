"""Hugging Face folders to test with: the golden ones, and some written here."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from gemma_jax import pytree
from gemma_jax.formats import hf_safetensors
from gemma_jax.model.config import ModelConfig

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
    np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(x), err_msg=name)
