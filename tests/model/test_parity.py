"""Numbers of transformers and PEFT on tiny Gemma 1, 2 and 3, in float32.

Tolerances hold relative to max(1, |value|).
"""

import functools
import json
from pathlib import Path
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from gemma_jax import pytree
from gemma_jax.config.train import LoraConfig, OptimizerConfig
from gemma_jax.formats import open_base, peft
from gemma_jax.lora import factors as factors_lib
from gemma_jax.model.config import ModelConfig
from gemma_jax.model.transformer import Transformer
from gemma_jax.training import optimizer
from gemma_jax.training import state as state_lib
from gemma_jax.training import step as step_lib
from gemma_jax.training.model import Model
from tests import toy

GOLDEN = Path(__file__).parents[1] / 'golden' / 'parity'
FAMILIES = ('gemma1', 'gemma2', 'gemma3')
PLAIN = [(family, tag) for family in FAMILIES for tag in ('qv', 'all')]
CASES = [*PLAIN, ('gemma3', 'dora')]


class Family(NamedTuple):
  """A base, its batch, and what transformers computed with it."""

  folder: Path
  config: ModelConfig
  params: Any
  batch: dict[str, jax.Array]
  is_real: np.ndarray
  reference: dict[str, np.ndarray]
  meta: dict[str, Any]


@functools.cache
def load(name: str) -> Family:
  folder = GOLDEN / name
  base = open_base.open_base(str(folder))
  reference = load_file(folder / 'ref_base.safetensors')
  mask = jnp.asarray(reference['attention_mask'], jnp.int32)
  # Logits at t are scored by the label at t + 1; -100 does not count, and the
  # last position predicts nothing.
  labels = np.pad(reference['labels'][:, 1:], ((0, 0), (0, 1)), constant_values=-100)
  batch = {
    'tokens': jnp.asarray(reference['input_ids'], jnp.int32),
    'segment_ids': mask,
    'positions': jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape),
    'targets': jnp.asarray(np.maximum(labels, 0), jnp.int32),
    'weights': jnp.asarray(labels != -100, jnp.float32),
  }
  return Family(
    folder=folder,
    config=base.config,
    params=base.load_params('float32'),
    batch=batch,
    is_real=np.asarray(mask) > 0,
    reference=reference,
    meta=json.loads((folder / 'meta.json').read_text()),
  )


@functools.cache
def forward(name: str):
  """params → (embedded, layers' outputs [L], hidden states, logits, loss)."""
  family = load(name)
  model = Transformer(family.config)

  def run(params):
    variables = {'params': params}
    hidden, sown = model.apply(
      variables, family.batch['tokens'], family.batch['segment_ids'], mutable='intermediates'
    )
    logits = model.apply(variables, hidden, method='logits')
    loss = toy.loss(model, variables, family.batch)
    sown = sown['intermediates']
    return (sown['embedded'][0], sown['layers']['hidden'][0], hidden, logits, loss)

  return jax.jit(run)


class Adapted(NamedTuple):
  """An adapter, what it computes, and what PEFT computed with it."""

  lora_config: LoraConfig
  factors: Any
  logits: np.ndarray
  loss: np.ndarray
  start_logits: np.ndarray  # with B = 0
  reference: dict[str, np.ndarray]


@functools.cache
def adapted(name: str, tag: str) -> Adapted:
  family = load(name)
  lora_config, factors = peft.read_adapter(family.folder / f'adapter_{tag}', family.config)
  model = Model(Transformer(family.config))

  def run(params, factors):
    variables = factors_lib.variables(params, factors, lora_config.scale)
    hidden = model.hidden(variables, family.batch)
    logits = model.apply(variables, hidden, method='logits')
    loss, weight, _ = step_lib.token_loss(model, variables, family.batch, None)
    return logits, loss / weight

  run = jax.jit(run)
  logits, loss = run(family.params, factors)
  start = pytree.map_with_name(lambda name, x: 0 * x if name.endswith('lora_b') else x, factors)
  start_logits, _ = run(family.params, start)
  reference = load_file(family.folder / f'ref_{tag}.safetensors')
  return Adapted(lora_config, factors, logits, loss, start_logits, reference)


@functools.cache
def trained(name: str, tag: str) -> tuple[list[np.ndarray], Any]:
  """Losses of four real steps, and the gradients that the first one took.

  The optimizer is set as torch.optim.AdamW was: no decay, no clipping.
  """
  family, adapter = load(name), adapted(name, tag)
  config = OptimizerConfig(learning_rate=1e-2, schedule='constant', weight_decay=0.0, clip_norm=0.0)
  patterns = ('lora/',)
  tx = optimizer.make_optimizer(config, 4, patterns)
  trainable, frozen = state_lib.split({'params': family.params, 'lora': adapter.factors}, patterns)
  state = state_lib.init_state(trainable, tx)
  schedule = optimizer.make_schedule(config, 4)
  step = jax.jit(
    step_lib.make_train_step(
      Model(Transformer(family.config)), step_lib.token_loss, lambda _: (tx, schedule)
    )
  )
  hyper = step_lib.Hyperparameters(jnp.float32(adapter.lora_config.scale))
  losses = []
  for i in range(4):
    state, metrics = step(state, hyper, frozen, family.batch)
    losses.append(np.asarray(metrics['loss']))
    if i == 0:
      # The first moment starts at zero: it is (1 - b1) times the gradient.
      (mu,) = (
        leaf.mu for leaf in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(leaf)
      )
      gradients = jax.tree.map(lambda m: m / (1 - config.b1), mu['lora'])
  return losses, gradients


def _is_adam(node: Any) -> bool:
  return isinstance(node, optax.ScaleByAdamState)


def assert_logits(family: Family, got: jax.Array, want: np.ndarray):
  """At real positions, for the rows of the vocabulary that are there."""
  got = np.asarray(got)[..., : want.shape[-1]]
  toy.assert_close(got[family.is_real], want[family.is_real], 1e-4)


@pytest.mark.parametrize('name', FAMILIES)
def test_hidden_states_of_every_layer(name):
  family = load(name)
  embedded, layers, hidden, _, _ = forward(name)(family.params)
  # transformers' last hidden state is the one after the final norm.
  got = [embedded, *layers[:-1], hidden]
  assert len(got) == family.config.num_layers + 1
  for i, x in enumerate(got):
    want = family.reference[f'base.hidden.{i}']
    real = family.is_real
    toy.assert_close(x[real], want[real], 1e-4, f'hidden {i}')


@pytest.mark.parametrize('name', FAMILIES)
def test_logits_and_loss(name):
  family = load(name)
  *_, logits, loss = forward(name)(family.params)
  real = family.is_real
  toy.assert_close(logits[real], family.reference['base.logits'][real], 1e-4)
  toy.assert_close(loss, family.meta['base.loss'], 1e-5)


@pytest.mark.parametrize(('name', 'tag'), PLAIN)
def test_before_its_first_update_an_adapter_changes_no_bit(name, tag):
  *_, logits, _ = forward(name)(load(name).params)
  np.testing.assert_array_equal(adapted(name, tag).start_logits, logits)


@pytest.mark.parametrize(('name', 'tag'), CASES)
def test_logits_and_loss_with_an_adapter(name, tag):
  family, adapter = load(name), adapted(name, tag)
  count = pytree.num_params(adapter.factors)
  assert count == family.meta[f'{tag}.trainable']
  assert_logits(family, adapter.logits, adapter.reference['logits'])
  toy.assert_close(adapter.loss, family.meta[f'{tag}.loss'], 1e-5)


@pytest.mark.parametrize(('name', 'tag'), CASES)
def test_gradients_of_the_factors(name, tag, tmp_path):
  """PEFT's gradients, brought into our layout by the adapter's own reader."""
  family = load(name)
  _, gradients = trained(name, tag)
  tensors = {
    key.removeprefix('grad.'): x
    for key, x in adapted(name, tag).reference.items()
    if key.startswith('grad.')
  }
  save_file(tensors, tmp_path / peft.WEIGHTS_NAME)
  shutil.copy(family.folder / f'adapter_{tag}' / peft.CONFIG_NAME, tmp_path)
  _, want = peft.read_adapter(tmp_path, family.config)
  toy.assert_close(gradients, want, 1e-4)
  assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize(('name', 'tag'), CASES)
def test_losses_of_four_steps_of_adamw(name, tag):
  losses, _ = trained(name, tag)
  want = load(name).meta[f'{tag}.adamw_losses']
  assert len(want) == 4
  toy.assert_close(losses, want, 1e-4)


@pytest.mark.parametrize(('name', 'tag'), CASES)
def test_merged_logits(name, tag):
  family, adapter = load(name), adapted(name, tag)
  scale = adapter.lora_config.scale
  merged = factors_lib.merge(family.params, adapter.factors, scale)
  *_, logits, _ = forward(name)(merged)
  assert_logits(family, logits, adapter.reference['merged_logits'])
  base = family.reference['base.logits']
  assert np.abs(logits - base)[family.is_real].max() > 0.1


def test_patterns_of_rank_and_alpha(tmp_path):
  """Layers of unlike rank in one scan, active, merged and written back."""
  family, adapter = load('gemma1'), adapted('gemma1', 'patterns')
  assert adapter.lora_config.ranks == {
    'layer_0/attn/q': 2,
    'layer_0/mlp/up': 5,
    'layer_1/mlp/up': 5,
  }
  assert adapter.factors['layers']['attn']['q']['lora_a'].shape == (2, 64, 4)
  assert_logits(family, adapter.logits, adapter.reference['logits'])
  toy.assert_close(adapter.loss, family.meta['patterns.loss'], 1e-5)
  scale = adapter.lora_config.scale
  merged = factors_lib.merge(family.params, adapter.factors, scale)
  *_, logits, _ = forward('gemma1')(merged)
  assert_logits(family, logits, adapter.reference['merged_logits'])
  peft.write_adapter(tmp_path / 'a', adapter.factors, adapter.lora_config, 'base')
  written = load_file(tmp_path / 'a' / peft.WEIGHTS_NAME)
  count = sum(x.size for x in written.values())
  assert count == family.meta['patterns.trainable']
  _, again = peft.read_adapter(tmp_path / 'a', family.config)
  toy.assert_close(again, adapter.factors, 1e-6)
