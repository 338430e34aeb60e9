"""The parameter table gives every published figure, from shapes alone."""

import pytest

from gemma_jax.config.train import BaseConfig, LoraConfig, TrainConfig
from gemma_jax.model import variants
from gemma_jax.runs import metrics, summary


def summarize(variant, trainable=('lora/',), scan_layers=True, **lora):
  config = TrainConfig(
    trainable=trainable, model=BaseConfig(scan_layers=scan_layers), lora=LoraConfig(rank=4, **lora)
  )
  return summary.summarize(config.resolve(), variants.get(variant))


def test_keras_backbone_with_adapters():
  counts = summarize('gemma_2b', factorization='keras', targets='qv').counts
  assert counts['base'] == 2_506_172_416
  assert counts['adapter'] == 1_363_968
  assert counts['model_total'] == 2_507_536_384


def test_keras_training_summary_by_its_mask():
  """One layer's value kernel with its adapter was trainable there."""
  parameters = summarize(
    'gemma_2b',
    trainable=('params/layer_17/attn/v/w', 'lora/layer_17/attn/v/'),
    scan_layers=False,
    factorization='keras',
    targets='qv',
  )
  assert parameters.counts['trainable'] == 533_504
  assert parameters.counts['frozen'] == 2_507_002_880
  assert parameters.counts['optimizer'] == 1_067_010
  assert parameters.counts['total_with_optimizer'] == 2_508_603_394
  sizes = {k: summary.format_bytes(v) for k, v in parameters.sizes_bytes.items()}
  assert sizes['trainable'] == '2.04 MiB'
  assert sizes['frozen'] == '9.34 GiB'
  assert sizes['optimizer'] == '4.07 MiB'
  assert sizes['total_with_optimizer'] == '9.35 GiB'


@pytest.mark.parametrize(
  ('variant', 'lora', 'expected'),
  [
    ('gemma_2b', {'targets': 'qv'}, 460_800),
    ('gemma_2b', {'targets': 'all'}, 4_902_912),
    ('gemma2_2b', {'targets': 'qv'}, 798_720),
    ('gemma2_2b', {'targets': 'qv', 'factorization': 'keras'}, 2_928_640),
    ('gemma2_2b', {'targets': 'all'}, 5_191_680),
    ('gemma3_270m', {'targets': 'qv'}, 184_320),
    ('gemma3_270m', {'targets': 'qv', 'factorization': 'keras'}, 267_264),
    ('gemma3_270m', {'targets': 'all'}, 949_248),
    ('gemma3_1b', {'targets': 'qv'}, 372_736),
    ('gemma3_1b', {'targets': 'qv', 'factorization': 'keras'}, 652_288),
    ('gemma3_1b', {'targets': 'all'}, 3_261_440),
  ],
)
def test_adapter_counts(variant, lora, expected):
  counts = summarize(variant, **lora).counts
  assert counts['adapter'] == expected
  assert counts['trainable'] == expected
  assert counts['optimizer'] == 2 * expected + 2


def test_no_weight_is_made():
  before = metrics.peak_memory_bytes()
  summarize('gemma_7b')
  assert metrics.peak_memory_bytes() - before < 200e6


def test_json_and_table_agree():
  parameters = summarize('tiny', targets='qv')
  as_json = parameters.to_json()
  assert as_json['trainable_bytes'] == 4 * as_json['trainable']
  table = parameters.table()
  assert f'{as_json["total_with_optimizer"]:,}' in table
  assert 'lora/layers/attn/q/lora_a' in table
  assert 'params/embedder' not in parameters.table(leaves=False)


@pytest.mark.parametrize(('size', 'text'), [(7, '7 B'), (1536, '1.50 KiB'), (2**31, '2.00 GiB')])
def test_bytes_are_readable(size, text):
  assert summary.format_bytes(size) == text
