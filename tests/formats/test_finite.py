"""Weights that are NaN or infinite are refused by name, wherever they lie."""

import ml_dtypes
import numpy as np
import pytest

from gemma_jax.config.train import LoraConfig
from gemma_jax.formats import adapter, finite, flax_writer, hf_writer, open_base, peft
from gemma_jax.model import variants
from tests import gguf_toy, logits_toy, peft_toy

BAD = [np.nan, np.inf, -np.inf]
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('bad', BAD)
def test_the_first_bad_value_is_named(dtype, bad):
  values = np.full((5, 7), np.finfo(np.float16).max, dtype)
  assert finite.problem(values, 'w') is None
  values[3, 2] = values[4, 1] = bad
  message = rf'a\.bin: tensor w is {bad} at \[13, 2\], expected finite'
  with pytest.raises(ValueError, match=message):
    finite.check(values, 'w', 'a.bin', first_row=10)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('bad', BAD[:2])
def test_a_base_in_a_hugging_face_folder(dtype, bad, tmp_path):
  base = logits_toy.source_of(variants.TINY3)
  base.tensors['layer_1/mlp/up/w'].read(0, 10)[9, 0] = bad  # a view
  hf_writer.write_folder(tmp_path, base, dtype)
  broken = open_base.open_base(str(tmp_path))
  name = 'model.layers.1.mlp.up_proj.weight'
  message = rf'{tmp_path}: tensor {name} is {bad} at \[9, 0\]'
  with pytest.raises(ValueError, match=message):
    broken.load_params()
  (tmp_path / 'again').mkdir()
  with pytest.raises(ValueError, match=message):
    hf_writer.write_folder(tmp_path / 'again', broken)


@pytest.mark.parametrize('scan_layers', [True, False])
def test_a_weight_beyond_bfloat16(scan_layers, tmp_path):
  """Finite in its file, infinite once cast."""
  base = logits_toy.source_of(variants.TINY3)
  values = base.tensors['layer_1/mlp/up/w'].read(0, 10)  # a view
  largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
  values[9, 0], values[8, 1] = largest, -np.nextafter(np.float32(largest), np.float32(np.inf))
  (tmp_path / 'a').mkdir()
  hf_writer.write_folder(tmp_path / 'a', base)
  source = open_base.open_base(str(tmp_path / 'a'))
  assert np.isfinite(source.load_params('bfloat16', scan_layers)['final_norm']['scale']).all()
  values[9, 3] = np.finfo(np.float32).max
  (tmp_path / 'b').mkdir()
  hf_writer.write_folder(tmp_path / 'b', base)
  source = open_base.open_base(str(tmp_path / 'b'))
  source.load_params('float32', scan_layers)
  name = 'model.layers.1.mlp.up_proj.weight'
  message = (
    rf'{tmp_path}/b: tensor {name} is 3\.403e\+38 at \[9, 3\], expected at most 3\.39e\+38, '
    r'the largest bfloat16\. Set model\.dtype=float32'
  )
  with pytest.raises(ValueError, match=message):
    source.load_params('bfloat16', scan_layers)


@pytest.mark.parametrize('writer', [hf_writer, flax_writer])
def test_a_weight_beyond_bfloat16_is_not_written(writer, tmp_path):
  base = logits_toy.source_of(variants.TINY)
  base.tensors['layer_0/mlp/down/w'].read(0, 9)[2, 1] = -np.finfo(np.float32).max  # a view
  with pytest.raises(ValueError, match=r'tensor .*down.* is -3\.403e\+38 at \[2, 1\]'):
    writer.write_folder(tmp_path, base, 'bfloat16')


def test_a_base_in_gguf(tmp_path):
  tensors = gguf_toy.make_tensors(gguf_toy.GEMMA3)
  tensors['blk.0.ffn_up.weight'][5, 3] = np.nan
  path = tmp_path / 'm.gguf'
  gguf_toy.write(path, 'gemma3', gguf_toy.GEMMA3, tensors)
  with pytest.raises(ValueError, match=r'm\.gguf: tensor blk\.0\.ffn_up'):
    gguf_toy.open_gguf(path).load_params()


def test_a_base_in_a_flax_release(tmp_path):
  base = logits_toy.source_of(variants.TINY)
  base.tensors['layer_0/mlp/down/w'].read(0, 9)[2, 1] = np.inf  # a view
  flax_writer.write_folder(tmp_path, base)
  broken = open_base.open_base(str(tmp_path))
  with pytest.raises(ValueError, match=r'tensor .*mlp/linear.* is inf at'):
    broken.load_params()


@pytest.mark.parametrize('bad', BAD[:2])
def test_an_adapter(bad, tmp_path):
  config = LoraConfig(rank=2)
  folder = tmp_path / 'a'
  lora = peft_toy.make_lora(peft_toy.MODEL, config)
  peft.write_adapter(folder, lora, config, 'b')
  name = f'{peft_toy.STEM}.1.self_attn.q_proj.lora_B.weight'

  def change(tensors):
    tensors[name][3, 1] = bad

  peft_toy.edit_tensors(folder, change)
  message = rf'adapter_model.safetensors: tensor {name} is {bad} at \[3, 1\]'
  with pytest.raises(ValueError, match=message):
    adapter.read(folder, peft_toy.MODEL)


def test_base_leaves_trained_with_an_adapter(tmp_path):
  config = LoraConfig(rank=2)
  lora = peft_toy.make_lora(peft_toy.MODEL, config)
  scale = np.array([1, np.nan], np.float32)
  leaves = {'final_norm': {'scale': scale}}
  peft.write_adapter(tmp_path / 'a', lora, config, 'b', leaves)
  with pytest.raises(ValueError, match='tensor final_norm/scale is nan at'):
    adapter.read(tmp_path / 'a', peft_toy.MODEL)
