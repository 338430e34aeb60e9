"""A gang's members learn what they would have learnt alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import pytree
from gemma_jax.config.train import LoraConfig, MeshConfig, TrainConfig
from gemma_jax.data import pipeline
from gemma_jax.lora import align
from gemma_jax.model.transformer import Transformer
from gemma_jax.runs import batched
from gemma_jax.training import optimizer, sharding
from gemma_jax.training import state as state_lib
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
  """(state, losses [steps, K]) of `MEMBERS` trained as one gang.

  All of them mapped, and one after the other.
  """
  together = batched.stack(align.align([factors(*m[:3]) for m in MEMBERS]))
  trainable, frozen = state_lib.split({'params': toy.base(), 'lora': together}, ('lora/',))
  members = batched.Members(
    scale=jnp.array([lora_config(*m[:3]).scale for m in MEMBERS]),
    learning_rate=jnp.array([m[3] for m in MEMBERS]),
    seed=jnp.array([m[4] for m in MEMBERS]),
  )
  model = Transformer(toy.FULL, dropout=0.2)
  step = jax.jit(
    batched.make_train_step(model, CONFIG, 100, num_pieces=None, at_once=request.param)
  )
  tx = optimizer.make_optimizer(CONFIG.optimizer, 100, ('lora/',))
  state = batched.init_state(trainable, tx)
  losses = []
  for batch in batches:
    state, metrics = step(state, members, frozen, batch)
    losses.append(metrics['loss'])
  return state, np.stack(losses)


@pytest.mark.parametrize('index', range(len(MEMBERS)))
def test_a_member_equals_one_trained_alone(together, batches, index):
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
  mine = batched.cut(batched.member(state.trainable, index), rank)
  toy.assert_close(mine, alone.state.trainable, 1e-5)
  assert alone.losses[-1] != alone.losses[0]


def test_padding_stays_zero_to_the_bit(together):
  """Factors and moments, after steps with decay, dropout and clipping."""
  state, _ = together
  for index, (rank, *_) in enumerate(MEMBERS):
    changed = (state.trainable, state.opt_state)
    for name, x in pytree.items(batched.member(changed, index)):
      if name.endswith('/lora_a'):
        assert not np.any(x[..., rank:]), name
        assert np.all(x[..., :rank]), name
      elif name.endswith('/lora_b'):
        assert not np.any(x[:, rank:]), name
        assert np.all(x[:, :rank]), name


def configs(records, **changes):
  """Three resolved configs of one gang; `changes` are of all of them."""
  found = []
  for rank, alpha, rule, rate, seed in MEMBERS:
    config = run_toy.config(records, **changes)
    config.lora = lora_config(rank, alpha, rule)
    config.optimizer.learning_rate = rate
    config.seed = seed
    config.data.order_seed = 0
    config.data.global_batch_size = 4
    config.data.seq_len = 48
    found.append(config.resolve())
  return found


@pytest.fixture(scope='module')
def records(tmp_path_factory):
  return run_toy.write_records(tmp_path_factory.mktemp('records'))


def steps_of(members, count=3):
  """Losses [count, K] of a gang's own steps."""
  run = members.run
  state, frozen = members.abstract
  params = run.source.load_params(
    run.dtype, True, jax.tree.map(lambda x: x.sharding, frozen['params'])
  )
  trainable, frozen = state_lib.split(
    {'params': params, 'lora': members.init_adapters()}, ('lora/',)
  )
  placed = jax.tree.map(lambda x: x.sharding, state)
  state = jax.device_put(batched.init_state(trainable, run.tx), placed)
  step = members.compile_train_step()
  batches = pipeline.train_batches(run.train, run.plan, 0, count)
  losses = []
  for _, batch in batches:
    batch = sharding.put_batch(batch, run.mesh)
    state, metrics = step(state, members.members, frozen, batch)
    losses.append(metrics['loss'])
  return np.stack(losses)


def test_on_a_mesh_equals_one_device(records):
  """Adapters replicated, base and rows over data x fsdp."""
  one = batched.Gang(configs(records))
  mesh = MeshConfig(data=2, fsdp=2)
  many = batched.Gang(configs(records, mesh=mesh))
  toy.assert_close(steps_of(many), steps_of(one), 1e-5)


def test_on_a_cpu_long_batches_are_not_mapped(records):
  members = batched.Gang(configs(records))
  sizes = (1, 256, 257, 1024, 4096)
  assert [members._at_once(n) for n in sizes] == [3, 3, 1, 1, 1]


def test_members_keep_their_own_initial_factors(records):
  members = batched.Gang(configs(records))
  adapters = members.init_adapters()
  for index, config in enumerate(members.configs):
    mine = batched.cut(batched.member(adapters, index), config.lora.rank)
    want = state_lib.init_adapter(config, members.run.source.config)
    toy.assert_equal(mine, want)


def test_configs_that_differ_in_more_are_refused(records):
  first, *rest = configs(records)
  other = configs(records, steps=11)[1]
  with pytest.raises(ValueError, match='gang: steps is 7 for one member'):
    batched.Gang([first, other, *rest])


def test_seeds_that_order_the_data_are_refused(records):
  found = []
  for config in configs(records):
    data = dataclasses.replace(config.data, order_seed=-1)
    found.append(dataclasses.replace(config, data=data).resolve())
  with pytest.raises(ValueError, match='gang: seed is 0 for one member'):
    batched.Gang(found)


def test_a_base_that_is_trained_is_refused(records):
  found = configs(records, trainable=('params/layers/attn/v/w',))
  with pytest.raises(ValueError, match='Train this config alone'):
    batched.Gang(found)
