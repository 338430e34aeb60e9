"""A planted rank is found: by the losses, by the spectra, by truncation.

The teacher is the base plus an update of rank 2 to one kernel. Students of
ranks 1 to 4, trained at once, see the teacher's whole distribution at every
position: each row is there once for each token of the vocabulary, weighted by
the teacher's probability of that token. So the least loss is the teacher's
entropy, without any noise.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.config.train import LoraConfig, OptimizerConfig
from gemma_jax.lora import factors as factors_lib
from gemma_jax.lora import spectrum
from gemma_jax.lora.lora import Lora
from gemma_jax.model.transformer import Transformer
from gemma_jax.training import batched, optimizer
from gemma_jax.training import state as state_lib
from gemma_jax.training import step as step_lib
from gemma_jax.training.model import Model
from tests import toy

TEACHER_RANK = 2
RANKS = (1, 2, 3, 4)
STEPS = 1500
MODEL = dataclasses.replace(
  toy.PLAIN, vocab_size=29, embed_dim=7, hidden_dim=11, num_layers=1, num_heads=2, head_dim=4
)
OPTIMIZER = OptimizerConfig(learning_rate=3e-2, schedule='cosine')


def settings(rank):
  return LoraConfig(rank=rank, alpha=1, scale_rule='constant', targets='down')


def teacher():
  """Factors of an update with the singular values 2 and 1."""
  rng = np.random.default_rng(0)
  orthonormal = lambda n: np.linalg.qr(rng.standard_normal((n, 2)))[0]
  a = orthonormal(MODEL.hidden_dim) * np.array([2.0, 1.0])
  b = orthonormal(MODEL.embed_dim).T
  leaves = {'lora_a': a[None], 'lora_b': b[None]}
  return jax.tree.map(jnp.float32, {'layers': {'mlp': {'down': leaves}}})


def lesson(model, params, rows=6, length=7):
  """(batch of rows x V, the teacher's entropy per position)."""
  V = MODEL.vocab_size
  tokens = np.random.default_rng(1).integers(2, V, (rows, length), np.int32)
  batch = {
    'tokens': tokens,
    'segment_ids': np.ones_like(tokens),
    'positions': np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
  }
  hidden = model.hidden({'params': params, 'lora': teacher()}, batch)
  logits = hidden @ params['embedder']['input_embedding'].T
  p = np.asarray(jax.nn.softmax(logits), np.float64)  # [rows, length, V]
  entropy = -(p * np.log(p)).sum(-1).mean()
  batch = {name: np.repeat(x, V, 0) for name, x in batch.items()}
  batch['targets'] = np.tile(np.arange(V, dtype=np.int32)[:, None], (rows, length))
  weights = np.moveaxis(p, -1, 1).reshape(rows * V, length)
  batch['weights'] = weights.astype(np.float32)
  return batch, entropy


@pytest.fixture(scope='module')
def learnt():
  """(rank → its adapter, function of an adapter → excess loss)."""
  model, params = Model(Transformer(MODEL, remat='none')), toy.base(MODEL)
  batch, entropy = lesson(model, params)
  initial = [
    Lora(factors_lib.init(jax.random.key(0), MODEL, config), np.float32(config.scale), config)
    for config in map(settings, RANKS)
  ]
  lora = Lora.stack(initial)
  trainable, frozen = state_lib.split({'params': params, 'lora': lora.factors}, ('lora/',))
  hyper = step_lib.Hyperparameters(lora.scale)
  tx = optimizer.make_optimizer(OPTIMIZER, STEPS, ('lora/',))
  step = batched.map_train_step(
    step_lib.make_train_step(model, step_lib.token_loss, lambda _: (tx, None))
  )

  @jax.jit
  def train(state):
    advance = lambda state, _: (step(state, hyper, frozen, batch)[0], None)
    return jax.lax.scan(advance, state, length=STEPS)[0]

  state = train(batched.init_state(trainable, tx))
  trained = dataclasses.replace(lora, factors=jax.device_get(state.trainable['lora']))
  losses = jax.jit(model.token_losses)

  def excess(lora):
    total = losses(lora.variables(params), batch).sum()
    return float(total / batch['weights'].sum()) - entropy

  return dict(zip(RANKS, trained.members(), strict=True)), excess


def test_the_loss_has_its_floor_at_the_teachers_rank(learnt):
  loras, excess = learnt
  losses = {rank: excess(lora) for rank, lora in loras.items()}
  assert losses[1] > 1e-2
  for rank in (2, 3, 4):
    assert abs(losses[rank]) < 1e-3, losses


def test_spectra_show_as_many_values_as_the_teacher_has(learnt):
  loras, _ = learnt
  for rank in (2, 3, 4):
    values = spectrum.singular_values(loras[rank], MODEL)
    (down,) = values['mlp/down']
    np.testing.assert_allclose(down[:2], [2, 1], rtol=0.05)
    assert np.all(down[2:] < 0.05), down


def test_truncation_agrees(learnt):
  """Cut to the teacher's rank costs nothing; below it, what training has."""
  loras, excess = learnt
  cut = {rank: excess(spectrum.truncate(loras[4], MODEL, rank)) for rank in RANKS}
  assert abs(cut[4] - excess(loras[4])) < 1e-5
  assert abs(cut[2] - cut[4]) < 1e-3
  assert abs(cut[3] - cut[4]) < 1e-3
  # The best of rank 1 in loss is at least as good as the best in |dW|.
  assert cut[1] > 0.999 * excess(loras[1]) > 1e-2
