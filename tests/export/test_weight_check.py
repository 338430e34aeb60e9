"""Outputs that hold other weights than they should, however little it shows."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from gemma_jax.config.train import LoraConfig
from gemma_jax.export import merged, weight_check
from gemma_jax.formats.base_source import StoredTensor
from gemma_jax.lora.lora import Lora
from tests import logits_toy, peft_toy

DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}
CONFIG = LoraConfig(rank=5, alpha=0.1, targets='all')


@pytest.fixture(params=DTYPES)
def dtype(request):
  return np.dtype(DTYPES[request.param])


@pytest.fixture
def base(dtype):
  return logits_toy.cast(logits_toy.source_of(peft_toy.MODEL), dtype)


def make(config=CONFIG):
  factors = peft_toy.make_lora(peft_toy.MODEL, config)
  return Lora(factors, np.float32(config.scale), config)


def written(base, dtype, lora):
  return logits_toy.cast(merged.merge(base, lora), dtype)


def with_tensor(source, name, change):
  """The source, one of its tensors put through a function of its rows."""
  old = source.tensors[name]
  new = StoredTensor(old.name, old.shape, lambda i, j: change(old.read(i, j)))
  return dataclasses.replace(source, tensors={**source.tensors, name: new})


@pytest.mark.parametrize(
  'kwargs', [{}, {'dora': True}, {'factorization': 'keras', 'targets': 'qv'}]
)
def test_merged_model_is_what_it_should_be(kwargs, base, dtype):
  config = dataclasses.replace(CONFIG, **kwargs)
  lora = make(config)
  got = weight_check.compare(base, written(base, dtype, lora), dtype, lora)
  assert got.num_changed == 3 * len(config.target_names)
  weights = base.load_params('float32')
  largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(weights))
  assert got.largest_difference <= 2 * largest * (1e-6 if dtype == np.float32 else 2**-8)


def test_base_alone_is_equal(base, dtype):
  got = weight_check.compare(base, base, dtype)
  assert got == weight_check.Comparison(0.0, 0)


def test_leaves_trained_along_count(base, dtype):
  lora = make()
  trained = {'final_norm': {'scale': np.full(11, 0.3, np.float32)}}
  along = dataclasses.replace(lora, trained_base=trained)
  result = written(base, dtype, along)
  got = weight_check.compare(base, result, dtype, along)
  assert got.num_changed == 3 * 7 + 1
  with pytest.raises(ValueError, match='tensor final_norm/scale is not that'):
    weight_check.compare(base, result, dtype, lora)


def test_half_the_scale_is_noticed(base, dtype):
  half = make(dataclasses.replace(CONFIG, alpha=CONFIG.alpha / 2))
  with pytest.raises(ValueError, match='tensor layer_0/attn/q/w differs'):
    weight_check.compare(base, written(base, dtype, half), dtype, make())


@pytest.mark.parametrize('name', ['layer_1/attn/v/w', 'layer_2/mlp/down/w'])
def test_kernel_that_was_not_merged_is_noticed(name, base, dtype):
  lora = make()
  result = written(base, dtype, lora)
  tensors = {**result.tensors, name: base.tensors[name]}
  result = dataclasses.replace(result, tensors=tensors)
  with pytest.raises(ValueError, match=f'tensor {name} differs'):
    weight_check.compare(base, result, dtype, lora)


@pytest.mark.parametrize('name', ['layer_1/attn/v/w', 'final_norm/scale'])
def test_nan_is_not_taken_for_equal(name, base, dtype):
  lora = make()
  result = written(base, dtype, lora)
  result = with_tensor(result, name, lambda rows: rows * np.nan)
  with pytest.raises(ValueError, match=f'tensor {name}'):
    weight_check.compare(base, result, dtype, lora)


def test_one_bit_of_the_base_is_noticed(base, dtype):
  name = 'layer_1/mlp/up/w'

  def flip(rows):
    rows = rows.copy()
    bits = rows.view(np.uint16 if rows.itemsize == 2 else np.uint32)
    bits[-1, -1] ^= 1
    return rows

  with pytest.raises(ValueError, match=f'tensor {name} is not that of toy'):
    weight_check.compare(base, with_tensor(base, name, flip), dtype)


def test_update_below_the_last_bit_is_no_change():
  dtype = np.dtype(ml_dtypes.bfloat16)
  base = logits_toy.cast(logits_toy.source_of(peft_toy.MODEL), dtype)
  tiny = make(dataclasses.replace(CONFIG, alpha=1e-11))
  result = written(base, dtype, tiny)
  got = weight_check.compare(base, result, dtype, tiny)
  assert got.num_changed == 0
