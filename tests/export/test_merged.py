"""A merged base: its tensors, its dtypes, its refusals."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from gemma_jax import pytree
from gemma_jax.config.train import LoraConfig
from gemma_jax.export import merged
from gemma_jax.lora import factors as factors_lib
from gemma_jax.lora.lora import Lora
from tests import hf_toy, logits_toy, peft_toy


@pytest.fixture(scope='module')
def base():
  return logits_toy.source_of(peft_toy.MODEL)


def make(config, factors, trained=None):
  return Lora(factors, np.float32(config.scale), config, trained or {})


@pytest.mark.parametrize('factorization', ['matrix', 'keras'])
@pytest.mark.parametrize('targets', ['qv', 'all'])
@pytest.mark.parametrize('scan_layers', [True, False])
@pytest.mark.parametrize('dora', [False, True])
def test_merged_is_lora_merge(base, factorization, targets, scan_layers, dora):
  config = LoraConfig(rank=5, alpha=7.0, targets=targets, factorization=factorization, dora=dora)
  factors = peft_toy.make_lora(peft_toy.MODEL, config)
  got = merged.merge(base, make(config, factors)).load_params(scan_layers=scan_layers)
  want = factors_lib.merge(base.load_params(), factors, config.scale)
  want = dict(pytree.items(want))
  for name, x in pytree.items(got):
    if scan_layers:
      w = want[name]
    else:
      layer, _, rest = name.partition('/')
      i = layer.removeprefix('layer_')
      w = want[f'layers/{rest}'][int(i)] if i.isdigit() else want[name]
    scale = np.abs(w).max()
    np.testing.assert_allclose(x, w, 0, 1e-6 * scale, err_msg=name)


def test_only_the_targets_change(base):
  config = LoraConfig(rank=5, targets='k|down')
  factors = peft_toy.make_lora(peft_toy.MODEL, config)
  got = merged.merge(base, make(config, factors)).load_params(scan_layers=False)
  before = dict(pytree.items(base.load_params(scan_layers=False)))
  changed = {name for name, x in pytree.items(got) if not np.array_equal(x, before[name])}
  assert changed == {f'layer_{i}/{name}/w' for i in range(3) for name in ('attn/k', 'mlp/down')}


def test_bfloat16_base_is_rounded_once(base):
  """W in bfloat16 and BA in float32: the sum is not rounded before the end."""
  config = LoraConfig(rank=5, alpha=0.01, targets='qv')
  factors = peft_toy.make_lora(peft_toy.MODEL, config)
  narrow = logits_toy.cast(base, ml_dtypes.bfloat16)
  result = merged.merge(narrow, make(config, factors))
  got = np.asarray(result.load_params('float32')['layers']['attn']['q']['w'])
  w = np.asarray(narrow.load_params('float32')['layers']['attn']['q']['w'])
  a = factors['layers']['attn']['q']['lora_a'].astype(np.float64)
  b = factors['layers']['attn']['q']['lora_b'].astype(np.float64)
  want = w + config.scale * np.einsum('ldr,lrnh->lndh', a, b)
  np.testing.assert_allclose(got, want, 1e-5, 1e-6)
  hf_toy.assert_trees_equal(
    result.load_params('bfloat16'),
    jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), result.load_params('float32')),
  )


def test_trained_base_leaves_replace_those_of_the_base(base):
  config = LoraConfig(rank=5, targets='q')
  factors = peft_toy.make_lora(peft_toy.MODEL, config)
  rng = np.random.default_rng(3)
  v = rng.standard_normal((3, 2, 11, 14), np.float32)
  scale = rng.standard_normal(11, np.float32)
  trained = {'layers': {'attn': {'v': {'w': v}}}, 'final_norm': {'scale': scale}}
  got = merged.merge(base, make(config, factors, trained)).load_params()
  np.testing.assert_array_equal(got['layers']['attn']['v']['w'], v)
  np.testing.assert_array_equal(got['final_norm']['scale'], scale)
  with pytest.raises(ValueError, match='leaf final_norm/scale: got 7 values'):
    merged.merge(base, make(config, factors, {'final_norm': {'scale': scale[:7]}}))
  with pytest.raises(ValueError, match='leaf last_norm/scale: toy has none'):
    merged.merge(base, make(config, factors, {'last_norm': {'scale': scale}}))


def test_adapter_of_another_base_is_refused(base):
  config = LoraConfig(rank=5, targets='q')
  factors = peft_toy.make_lora(peft_toy.MODEL, config)
  factors['layers']['attn']['q']['lora_a'] = np.ones((3, 13, 5), np.float32)
  with pytest.raises(ValueError, match=r'layer_0/attn/q is made for a kernel'):
    merged.merge(base, make(config, factors))


def test_row_of_zeros_with_a_magnitude_stays_zero(base):
  """DoRA cannot bring nothing to a length; it must not make NaN of it."""
  config = LoraConfig(rank=5, targets='q', dora=True)
  factors = peft_toy.make_lora(peft_toy.MODEL, config)
  name = 'layer_0/attn/q/w'
  zeros = dataclasses.replace(
    base.tensors[name], read=lambda i, j: np.zeros((j - i, base.tensors[name].shape[1]), np.float32)
  )
  empty = dataclasses.replace(base, tensors={**base.tensors, name: zeros})
  factors['layers']['attn']['q']['lora_b'][0] = 0
  got = merged.merge(empty, make(config, factors)).tensors[name].read(0, 2)
  np.testing.assert_array_equal(got, np.zeros_like(got))
