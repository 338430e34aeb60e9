"""Tests of gemma_jax.model.config: what is no Gemma is refused."""

import pytest

from gemma_jax.model.config import ModelConfig

SIZES = {
  'vocab_size': 53,
  'embed_dim': 13,
  'hidden_dim': 17,
  'num_layers': 3,
  'num_heads': 10,
  'num_kv_heads': 2,
  'head_dim': 14,
}


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('vocab_size', 0),
    ('num_layers', -1),
    ('embed_dim', 13.0),
    ('num_kv_heads', 3),
    ('head_dim', 7),
    ('max_positions', 0),
    ('layer_is_local', (True, False)),
    ('window_size', None),
    ('window_size', 0),
  ],
)
def test_an_impossible_architecture_is_refused(field, value):
  fields = SIZES | {'layer_is_local': (True, False, True), 'window_size': 4}
  ModelConfig(**fields)
  with pytest.raises(ValueError, match=f'^{field}: got'):
    ModelConfig(**fields | {field: value})
