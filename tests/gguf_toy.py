"""GGUF files to test with, written by the gguf package."""

import gguf as gguf_package
import numpy as np

from gemma_jax.formats import gguf
from gemma_jax.model.config import ModelConfig

F32, F16, Q8_0, Q5_0, I8 = (
  gguf_package.GGMLQuantizationType[name] for name in ('F32', 'F16', 'Q8_0', 'Q5_0', 'I8')
)

# Rows of whole 32-element blocks, so that Q8_0 applies; no two sizes alike.
GEMMA3 = ModelConfig(
  vocab_size=263,
  embed_dim=64,
  hidden_dim=160,
  num_layers=7,
  num_heads=6,
  num_kv_heads=3,
  head_dim=16,
  layer_is_local=(True, True, True, True, True, False, True),
  window_size=11,
  rope_theta=1e6,
  rope_local_theta=1e4,
  rope_scale=8.0,
  use_qk_norm=True,
  use_post_norms=True,
  max_positions=509,
)
GEMMA1 = ModelConfig(
  vocab_size=263,
  embed_dim=64,
  hidden_dim=160,
  num_layers=2,
  num_heads=6,
  num_kv_heads=3,
  head_dim=16,
  max_positions=509,
)


def make_tensors(config):
  """GGUF names → float32 arrays as stored: matrices, and norms 1 + scale."""
  rng = np.random.default_rng(0)
  D, F, V = config.embed_dim, config.hidden_dim, config.vocab_size
  N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
  shapes = {'token_embd': (V, D), 'output_norm': (D,)}
  for i in range(config.num_layers):
    layer = {
      'attn_q': (N * H, D),
      'attn_k': (K * H, D),
      'attn_v': (K * H, D),
      'attn_output': (D, N * H),
      'ffn_gate': (F, D),
      'ffn_up': (F, D),
      'ffn_down': (D, F),
      'attn_norm': (D,),
      'ffn_norm': (D,),
    }
    if config.use_post_norms:
      layer |= {'post_attention_norm': (D,), 'post_ffw_norm': (D,)}
    if config.use_qk_norm:
      layer |= {'attn_q_norm': (H,), 'attn_k_norm': (H,)}
    shapes |= {f'blk.{i}.{name}': shape for name, shape in layer.items()}
  return {
    f'{name}.weight': rng.standard_normal(shape, np.float32) + np.float32(len(shape) == 1)
    for name, shape in shapes.items()
  }


def write(path, arch, config, tensors, kinds=None, **metadata):
  """A GGUF file; kinds gives the type of matrices that are not F32."""
  writer = gguf_package.GGUFWriter(path, arch)
  writer.add_context_length(config.max_positions)
  writer.add_embedding_length(config.embed_dim)
  writer.add_block_count(config.num_layers)
  writer.add_feed_forward_length(config.hidden_dim)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_key_length(config.head_dim)
  writer.add_value_length(config.head_dim)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  if config.window_size is not None:
    writer.add_sliding_window(config.window_size)
  if arch == 'gemma3':
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_scaling_type(gguf_package.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(config.rope_scale)
  for key, value in metadata.items():
    writer.add_key_value(*value) if isinstance(value, tuple) else (
      writer.add_array(key.replace('__', '.'), value)
    )
  for name, x in tensors.items():
    kind = (kinds or {}).get(name, F32)
    if kind == I8:
      writer.add_tensor(name, x.astype(np.int8))
    else:
      writer.add_tensor(name, gguf_package.quants.quantize(x, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def open_gguf(path):
  return gguf.open_gguf(path, str(path))
