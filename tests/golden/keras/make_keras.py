"""Adapters that KerasHub saved for a tiny Gemma, and what they do there.

KERAS_BACKEND=jax python make_keras.py  (keras 3.15.1, keras-hub 0.32.0)
"""

import pathlib

import keras_hub
import numpy as np

SIZES = dict(
  vocabulary_size=53,
  num_layers=2,
  num_query_heads=4,
  num_key_value_heads=2,
  hidden_dim=22,
  head_dim=6,
)
POST = dict(use_post_ffw_norm=True, use_post_attention_norm=True)
# Keras's Gemma counts gate and up together in intermediate_dim, Gemma 3 not.
BACKBONES = {
  'gemma1': keras_hub.models.GemmaBackbone(**SIZES, intermediate_dim=26),
  'gemma2': keras_hub.models.GemmaBackbone(
    **SIZES,
    **POST,
    intermediate_dim=26,
    use_sliding_window_attention=True,
    sliding_window_size=4,
    attention_logit_soft_cap=50.0,
    final_logit_soft_cap=30.0,
  ),
  'gemma3': keras_hub.models.Gemma3Backbone(
    **SIZES,
    **POST,
    intermediate_dim=13,
    image_size=16,
    vision_encoder=None,
    use_query_key_norm=True,
  ),
}
ALL = ['query', 'key', 'value', 'attention_output', 'ffw_gating', 'ffw_gating_2', 'ffw_linear']
here = pathlib.Path(__file__).parent
for family, backbone in BACKBONES.items():
  targets = ALL if family == 'gemma2' else None  # None: query and value
  backbone.enable_lora(3, targets)
  rng = np.random.default_rng(0)
  layers = [x for x in backbone._flatten_layers(include_self=False) if x.weights]
  deltas = {}
  for i in backbone._lora_enabled_layers:
    layer = layers[i]
    for w in (layer.lora_kernel_a, layer.lora_kernel_b):
      w.assign(rng.standard_normal(w.shape).astype(np.float32))
    deltas[layer.path.replace('/', '.')] = np.asarray(layer.kernel) - np.asarray(layer._kernel)
  backbone.save_lora_weights(str(here / f'{family}.lora.h5'))
  np.savez(here / f'{family}.npz', **deltas)
  print(family, {k: v.shape for k, v in deltas.items()})
