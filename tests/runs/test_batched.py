"""Adapters trained at once learn what they would have learnt alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import pytree
from gemma_jax.config.train import LoraConfig, MeshConfig, TrainConfig
from gemma_jax.lora import align
from gemma_jax.lora.lora import Lora
from gemma_jax.model.transformer import Transformer
from gemma_jax.runs import prepare as prepare_lib
from gemma_jax.runs.trainer import Trainer
from gemma_jax.training import batched
from gemma_jax.training import state as state_lib
from gemma_jax.training import step as step_lib
from gemma_jax.training.model import Model
from tests import run_toy, toy

pytestmark = pytest.mark.usefixtures('quick_compile')

STEPS = 50
CONFIG = TrainConfig(optimizer=dataclasses.replace(toy.ADAMW, schedule='cosine', warmup_steps=7))

# (rank, alpha, rule, learning rate, seed): no two alike.
MEMBERS = (
  (3, 5.0, 'alpha_over_r', 1e-3, 0),
  (1, 0.7, 'constant', 3e-3, 1),
  (7, 5.0, 'alpha_over_sqrt_r', 2e-3, 2),
)


def lora_config(rank, alpha, rule):
  return LoraConfig(rank=rank, alpha=alpha, scale_rule=rule, targets='q|v|down', dropout=0.2)


def factors(rank, alpha, rule):
  return toy.factors(lora_config=lora_config(rank, alpha, rule))


@pytest.fixture(scope='module')
def batches():
  return [toy.batch(seed=i) for i in range(STEPS)]


@pytest.fixture(scope='module', params=[None, 1])
def together(batches, request):
  """(state, losses [steps, K]) of `MEMBERS` trained at once.

  All of them mapped, and one after the other.
  """
  configs = [lora_config(*m[:3]) for m in MEMBERS]
  lora = Lora.stack(
    [Lora(factors(*m[:3]), np.float32(c.scale), c) for m, c in zip(MEMBERS, configs, strict=True)]
  )
  trainable, frozen = state_lib.split({'params': toy.base(), 'lora': lora.factors}, ('lora/',))
  hyper = step_lib.Hyperparameters(
    scale=jnp.asarray(lora.scale),
    learning_rate=jnp.array([m[3] for m in MEMBERS]),
    seed=jnp.array([m[4] for m in MEMBERS]),
  )
  make_optimizer = prepare_lib.make_optimizer(CONFIG.optimizer, 100, ('lora/',))
  model = Model(Transformer(toy.FULL, dropout=0.2))
  step = step_lib.make_train_step(model, step_lib.token_loss, make_optimizer)
  step = jax.jit(batched.map_train_step(step, at_once=request.param))
  state = batched.init_state(trainable, make_optimizer(None)[0])
  losses = []
  for batch in batches:
    state, metrics = step(state, hyper, frozen, batch)
    losses.append(metrics['loss'])
  return state, np.stack(losses)


@pytest.mark.parametrize('index', range(len(MEMBERS)))
def test_an_adapter_equals_one_trained_alone(together, batches, index):
  rank, alpha, rule, rate, seed = MEMBERS[index]
  alone = toy.train(
    {'params': toy.base(), 'lora': factors(rank, alpha, rule)},
    batches,
    lora_config=lora_config(rank, alpha, rule),
    optimizer_config=dataclasses.replace(CONFIG.optimizer, learning_rate=rate),
    seed=seed,
  )
  state, losses = together
  toy.assert_close(losses[:, index], np.array(alone.losses), 1e-5)
  mine = align.cut(align.member(state.trainable, index), rank)
  toy.assert_close(mine, alone.state.trainable, 1e-5)
  assert alone.losses[-1] != alone.losses[0]


def test_padding_stays_zero_to_the_bit(together):
  """Factors and moments, after steps with decay, dropout and clipping."""
  state, _ = together
  for index, (rank, *_) in enumerate(MEMBERS):
    changed = (state.trainable, state.opt_state)
    for name, x in pytree.items(align.member(changed, index)):
      if name.endswith('/lora_a'):
        assert not np.any(x[..., rank:]), name
        assert np.all(x[..., :rank]), name
      elif name.endswith('/lora_b'):
        assert not np.any(x[:, rank:]), name
        assert np.all(x[:, :rank]), name


def configs(records, **changes):
  """Three resolved configs to train at once; `changes` are of all of them."""
  made = []
  for rank, alpha, rule, rate, seed in MEMBERS:
    config = run_toy.config(records, **changes)
    config.lora = lora_config(rank, alpha, rule)
    config.optimizer.learning_rate = rate
    config.seed = seed
    config.data.order_seed = 0
    config.data.global_batch_size = 4
    config.data.seq_len = 48
    made.append(config.resolve())
  return made


@pytest.fixture(scope='module')
def records(tmp_path_factory):
  return run_toy.write_records(tmp_path_factory.mktemp('records'))


def steps_of(run, count=3):
  """Losses [count, K] of a run's own steps."""
  trainer = Trainer.of_run(run)
  return np.stack([metrics.loss for metrics in trainer.run(count)])


def test_on_a_mesh_equals_one_device(records):
  """Adapters replicated, base and rows over data x fsdp."""
  one = prepare_lib.prepare_several(configs(records))
  mesh = MeshConfig(data=2, fsdp=2)
  many = prepare_lib.prepare_several(configs(records, mesh=mesh))
  toy.assert_close(steps_of(many), steps_of(one), 1e-5)


def test_on_a_cpu_long_batches_are_not_mapped():
  sizes = (1, 256, 257, 1024, 4096)
  assert [batched.mapped_at_once(3, n, 'cpu') for n in sizes] == [3, 3, 1, 1, 1]
  assert batched.mapped_at_once(3, 4096, 'tpu') == 3


def test_adapters_keep_their_own_initial_factors(records):
  run = prepare_lib.prepare_several(configs(records))
  base = run.base
  for mine, config in zip(run.init_lora(base).members(), configs(records), strict=True):
    want = Lora.init(base, config.lora, seed=config.seed)
    assert (mine.config, float(mine.scale)) == (want.config, float(want.scale))
    toy.assert_equal(mine.factors, want.factors)


def test_configs_that_differ_in_more_are_refused(records):
  first, *rest = configs(records)
  other = configs(records, steps=11)[1]
  with pytest.raises(ValueError, match='batched adapters: steps is 7 for one adapter'):
    prepare_lib.prepare_several([first, other, *rest])


def test_seeds_that_order_the_data_are_refused(records):
  members = []
  for config in configs(records):
    data = dataclasses.replace(config.data, order_seed=-1)
    members.append(dataclasses.replace(config, data=data).resolve())
  with pytest.raises(ValueError, match='batched adapters: seed is 0 for one adapter'):
    prepare_lib.prepare_several(members)


def test_seeds_of_32_bits(records):
  first, second, *_ = configs(records)
  members = [dataclasses.replace(first, seed=2**32 - 1), dataclasses.replace(second, seed=2**31)]
  run = prepare_lib.prepare_several(members)
  assert run.hyperparameters.seed.tolist() == [2**32 - 1, 2**31]
  assert np.isfinite(steps_of(run, 1)).all()
  for seed in (-1, 2**32):
    with pytest.raises(ValueError, match=rf'seed: got {seed}, expected an integer in \[0, 2\^32\)'):
      Lora.init(run.base, rank=2, seed=seed)


def test_a_base_that_is_trained_is_refused(records):
  members = configs(records, trainable=('params/layers/attn/v/w',))
  with pytest.raises(ValueError, match='Train this config alone'):
    prepare_lib.prepare_several(members)
