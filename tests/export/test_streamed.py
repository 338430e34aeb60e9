"""A forward pass that holds one layer equals the model."""

import jax
import ml_dtypes
import numpy as np
import pytest

from gemma_jax import pytree
from gemma_jax.config.train import LoraConfig
from gemma_jax.export import streamed
from gemma_jax.formats import open_base
from gemma_jax.formats.base_source import StoredTensor
from gemma_jax.lora.lora import Lora
from gemma_jax.model import variants
from tests import hf_toy, logits_toy, peft_toy, toy

TOKENS = np.random.default_rng(0).integers(4, 250, (2, 13)).astype(np.int32)


@pytest.mark.parametrize('family', hf_toy.FAMILIES)
@pytest.mark.parametrize(
  ('factorization', 'dora'), [('matrix', False), ('keras', False), ('matrix', True), (None, False)]
)
def test_equals_the_loaded_model(family, factorization, dora):
  base = open_base.open_base(str(hf_toy.PARITY / family))
  lora = None
  if factorization:
    config = LoraConfig(rank=3, alpha=6.0, targets='all', factorization=factorization, dora=dora)
    factors = peft_toy.make_lora(base.config, config)
    factors = jax.tree.map(lambda x: x * np.float32(0.1), factors)
    lora = Lora(factors, np.float32(config.scale), config)
  params = base.load_params()
  want = logits_toy.logits(base.config, params, TOKENS, lora)
  toy.assert_close(streamed.logits(base, TOKENS, lora), want, 1e-5)


def test_bfloat16_weights():
  base = logits_toy.cast(logits_toy.source_of(variants.TINY3), ml_dtypes.bfloat16)
  want = logits_toy.logits(base.config, base.load_params('bfloat16'), TOKENS)
  toy.assert_close(streamed.logits(base, TOKENS), want, 1e-5)


def test_chunks_of_the_vocabulary_join(monkeypatch):
  base = logits_toy.source_of(variants.TINY2)
  whole = streamed.logits(base, TOKENS)
  monkeypatch.setattr('gemma_jax.formats.base_source.CHUNK_ELEMENTS', 3 * 34)
  assert whole.shape == (2, 13, 263)
  toy.assert_close(streamed.logits(base, TOKENS), whole, 1e-6)


def test_each_weight_is_read_once_and_in_order():
  """So that a checkpoint on a slow disk, or made as it is read, is fine."""
  base = logits_toy.source_of(variants.TINY3)
  order = []

  def watched(path, tensor):
    def read(start, stop):
      if not order or order[-1] != path:
        order.append(path)
      return tensor.read(start, stop)

    return StoredTensor(tensor.name, tensor.shape, read)

  for path in base.tensors:
    base.tensors[path] = watched(path, base.tensors[path])
  streamed.logits(base, TOKENS)
  layers = [p for p in order if p.startswith('layer_')]
  assert len(layers) == len(set(layers))
  assert [p.split('/')[0] for p in layers] == sorted(p.split('/')[0] for p in layers)
  names = {name for name, _ in pytree.items(base.load_params(scan_layers=False))}
  assert set(order) == names
