"""The architecture of a Flax release, from its shapes or its record."""

import dataclasses
import json

import pytest

from gemma_jax.formats import flax_config, flax_release, flax_writer, open_base
from gemma_jax.model import variants
from tests import logits_toy


@pytest.mark.parametrize('name', ['gemma_2b', 'gemma_7b', 'gemma2_2b', 'gemma3_270m', 'gemma3_1b'])
def test_variant_is_recognised_by_the_shapes(name, tmp_path):
  """From the shapes alone, with the 256128 rows of the release."""
  config = flax_writer.exported_config(variants.get(name))
  rows = 262_144 if name.startswith('gemma3') else 256_128
  assert config.vocab_size == rows
  fused = config.num_heads == config.num_kv_heads
  places = flax_release.make_places(config, fused, config.use_qk_norm)
  shapes = {place.name: place.shape for place in places.values()}
  if name == 'gemma_2b':
    assert shapes['layer_17/attn/q_einsum/w'] == (8, 2048, 256)
    assert shapes['layer_17/attn/kv_einsum/w'] == (2, 1, 2048, 256)
    assert shapes['layer_17/attn/attn_vec_einsum/w'] == (8, 256, 2048)
    assert shapes['layer_17/mlp/gating_einsum/w'] == (2, 2048, 16384)
    assert shapes['layer_17/mlp/linear/w'] == (16384, 2048)
  if name == 'gemma_7b':
    assert shapes['layer_27/attn/qkv_einsum/w'] == (3, 16, 3072, 256)
  if name == 'gemma3_1b':
    assert shapes['layer_25/mlp/gating_einsum/w'] == (2, 6912, 1152)
  assert flax_config.model_config(shapes, tmp_path / 'x') == config


def test_other_sizes_take_what_their_family_shares(tmp_path):
  def settings(config, num_layers):
    config = dataclasses.replace(config, num_layers=num_layers, layer_is_local=None)
    places = flax_release.make_places(config, False, config.use_qk_norm)
    shapes = {p.name: p.shape for p in places.values()}
    return flax_config.model_config(shapes, tmp_path / 'x')

  gemma2 = settings(variants.TINY2, 42)
  assert gemma2.layer_is_local == variants.alternating(42, 1)
  assert (gemma2.window_size, gemma2.query_scale) == (4096, None)
  assert (gemma2.attention_softcap, gemma2.final_softcap) == (50.0, 30.0)
  assert settings(variants.TINY2, 46).query_scale == (34 / 4) ** -0.5
  gemma3 = settings(variants.TINY3, 34)
  assert gemma3.layer_is_local == variants.alternating(34, 5)
  assert (gemma3.window_size, gemma3.rope_scale) == (1024, 8.0)
  assert (gemma3.rope_theta, gemma3.rope_local_theta) == (1e6, 1e4)
  assert gemma3.max_positions == 131_072
  assert settings(variants.TINY, 7).layer_is_local is None


def test_shapes_of_two_variants_are_no_answer(monkeypatch, tmp_path):
  config = variants.TINY3
  places = flax_release.make_places(config, False, config.use_qk_norm)
  shapes = {p.name: p.shape for p in places.values()}
  assert flax_config.model_config(shapes, tmp_path / 'x') == config
  monkeypatch.setitem(variants.VARIANTS, 'again', config)
  assert flax_config.model_config(shapes, tmp_path / 'x') == config
  monkeypatch.setitem(variants.VARIANTS, 'capped', dataclasses.replace(config, final_softcap=7.0))
  with pytest.raises(ValueError, match='shapes of tiny3 and of again and of capped, expected conv'):
    flax_config.model_config(shapes, tmp_path / 'x')


def test_record_of_a_conversion_must_be_an_architecture(tmp_path):
  (tmp_path / 'm').mkdir()
  flax_writer.write_folder(tmp_path / 'm', logits_toy.source_of(variants.TINY))
  record = tmp_path / 'm' / flax_config.RECORD_NAME
  config = dataclasses.replace(variants.TINY, rope_theta=9973.0)
  record.write_text(json.dumps({'model_config': dataclasses.asdict(config)}))
  assert open_base.open_base(str(tmp_path / 'm')).config == config
  for text in ('{', '[]', '{"model_config": {"vocab_size": 3}}'):
    record.write_text(text)
    with pytest.raises(ValueError, match=r'conversion\.json: model_config'):
      open_base.open_base(str(tmp_path / 'm'))
  fields = {**dataclasses.asdict(config), 'num_layers': 10**9}
  record.write_text(json.dumps({'model_config': fields}))
  with pytest.raises(ValueError, match='got 1000000000 layers, expected'):
    open_base.open_base(str(tmp_path / 'm'))
