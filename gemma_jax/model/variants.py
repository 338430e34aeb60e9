"""Named architectures, each a `ModelConfig`; a variant is its difference.

Figures: the released checkpoints' config.json files and the Gemma reports
(arXiv 2403.08295, 2408.00118, 2503.19786). Query scale is head_dim ** -0.5 in
all of these sizes.
"""

import dataclasses

from gemma_jax.model.config import ModelConfig


def alternating(num_layers: int, locals_per_global: int) -> tuple[bool, ...]:
  """Layer pattern: `locals_per_global` local layers, then a global one, repeated.

  alternating(5, 2)    (True, True, False, True, True)
  """
  period = locals_per_global + 1
  return tuple((i + 1) % period != 0 for i in range(num_layers))


GEMMA_2B = ModelConfig(
  vocab_size=256_000,
  embed_dim=2048,
  hidden_dim=16_384,
  num_layers=18,
  num_heads=8,
  num_kv_heads=1,
  head_dim=256,
)

GEMMA_7B = dataclasses.replace(
  GEMMA_2B, embed_dim=3072, hidden_dim=24_576, num_layers=28, num_heads=16, num_kv_heads=16
)

GEMMA2_2B = ModelConfig(
  vocab_size=256_000,
  embed_dim=2304,
  hidden_dim=9216,
  num_layers=26,
  num_heads=8,
  num_kv_heads=4,
  head_dim=256,
  layer_is_local=alternating(26, 1),
  window_size=4096,
  use_post_norms=True,
  attention_softcap=50.0,
  final_softcap=30.0,
)

GEMMA3_270M = ModelConfig(
  vocab_size=262_144,
  embed_dim=640,
  hidden_dim=2048,
  num_layers=18,
  num_heads=4,
  num_kv_heads=1,
  head_dim=256,
  layer_is_local=alternating(18, 5),
  window_size=512,
  rope_theta=1_000_000.0,
  rope_local_theta=10_000.0,
  use_qk_norm=True,
  use_post_norms=True,
  max_positions=32_768,
)

GEMMA3_1B = dataclasses.replace(
  GEMMA3_270M, embed_dim=1152, hidden_dim=6912, num_layers=26, layer_is_local=alternating(26, 5)
)

# Small enough to compile in seconds; the byte tokenizer's 260 pieces fit. Each
# keeps every switch of the family that it represents.
TINY = ModelConfig(
  vocab_size=263,
  embed_dim=34,
  hidden_dim=46,
  num_layers=2,
  num_heads=4,
  num_kv_heads=1,
  head_dim=16,
  max_positions=512,
)

TINY2 = dataclasses.replace(
  TINY,
  num_kv_heads=2,
  layer_is_local=alternating(2, 1),
  window_size=7,
  use_post_norms=True,
  attention_softcap=5.0,
  final_softcap=3.0,
)

TINY3 = dataclasses.replace(
  TINY,
  num_layers=3,
  layer_is_local=alternating(3, 2),
  window_size=7,
  rope_theta=1_000_000.0,
  rope_local_theta=10_000.0,
  rope_scale=8.0,
  use_qk_norm=True,
  use_post_norms=True,
)

VARIANTS = {
  'gemma_2b': GEMMA_2B,
  'gemma_7b': GEMMA_7B,
  'gemma2_2b': GEMMA2_2B,
  'gemma3_270m': GEMMA3_270M,
  'gemma3_1b': GEMMA3_1B,
  'tiny': TINY,
  'tiny2': TINY2,
  'tiny3': TINY3,
}


def get(name: str) -> ModelConfig:
  """The architecture of that name; the ValueError for others lists the names."""
  if name not in VARIANTS:
    raise ValueError(f'variant: got {name!r}, expected one of {", ".join(VARIANTS)}.')
  return VARIANTS[name]
