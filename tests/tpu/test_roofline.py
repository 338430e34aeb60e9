"""The closed form against counting, and which resource it finds to bound."""

import dataclasses
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import pytree
from gemma_jax.config.train import LoraConfig, MeshConfig, OptimizerConfig, TrainConfig
from gemma_jax.model.transformer import Transformer
from gemma_jax.tpu import chips, hlo, roofline
from gemma_jax.training import sharding, state
from tests import toy

ROWS, LENGTH = 2, 11
BFLOAT16 = np.dtype(jnp.bfloat16)


def make_config(remat='none', mesh=None, **lora):
  config = TrainConfig(lora=LoraConfig(rank=3, **lora), mesh=mesh or MeshConfig(fsdp=1))
  config.model.remat = remat
  config.data.seq_len, config.data.global_batch_size = LENGTH, ROWS
  return config


def work(config, model_config=toy.FULL):
  mesh = sharding.make_mesh(config.mesh)
  return roofline.training_step(config, model_config, mesh, BFLOAT16)


@pytest.mark.parametrize('length', [1, 4, 11])
@pytest.mark.parametrize('window', [None, 1, 4, 11, 100])
def test_visible_pairs_by_counting(length, window):
  distance = np.arange(length)[:, None] - np.arange(length)[None]
  seen = (distance >= 0) & (distance < (window or length))
  assert roofline.visible_pairs(length, window) == seen.sum()


def dots(jaxpr, times=1):
  """2 x the multiplications of every product in a jaxpr, loops included."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      lhs = eqn.invars[0].aval.shape
      inner = math.prod(lhs[i] for i in contracted)
      total += 2 * times * inner * math.prod(eqn.outvars[0].aval.shape)
    turns = times * eqn.params.get('length', 1)
    for inner_jaxpr in jax.extend.core.jaxprs_in_params(eqn.params):
      total += dots(inner_jaxpr, turns)
  return total


def traced_flops(lora_config, differentiated):
  """Products of the model's forward pass, or of it and its gradients."""
  config = dataclasses.replace(toy.FULL, layer_is_local=None, window_size=None)
  model = Transformer(config, remat='none')
  variables = {'params': toy.base(config), 'lora': toy.factors(config, lora_config)}
  trainable, frozen = state.split(variables, differentiated)
  batch = toy.batch(rows=ROWS, length=LENGTH)

  def total(trainable):
    hidden = model.apply(
      state.join(trainable, frozen), batch['tokens'], batch['segment_ids'], batch['positions']
    )
    return jnp.sum(hidden)

  jaxpr = jax.make_jaxpr(jax.value_and_grad(total))(trainable)
  return config, dots(jaxpr.jaxpr)


@pytest.mark.parametrize('factorization', ['matrix', 'keras'])
def test_model_flops_are_those_of_the_traced_step(factorization):
  """Einsum attention computes all pairs; the closed form the visible ones.

  The gradient to the first layer's input is not needed and not traced apart:
  one scanned body makes it for every layer.
  """
  lora_config = LoraConfig(rank=3, targets='all', factorization=factorization)
  model_config, traced = traced_flops(lora_config, ('lora/',))
  config = make_config(targets='all', factorization=factorization)
  found = work(config, model_config).model_flops
  tokens = ROWS * LENGTH
  loss = 4 * tokens * model_config.embed_dim * model_config.vocab_size
  pairs = LENGTH**2 - roofline.visible_pairs(LENGTH, None)
  hidden_pairs = (
    12 * model_config.num_heads * model_config.head_dim * ROWS * pairs
  ) * model_config.num_layers
  assert found - loss + hidden_pairs == traced


def test_training_the_base_adds_its_kernels_gradient():
  config = make_config(targets='all')
  adapter_only = work(config).model_flops
  everything = dataclasses.replace(config, trainable=('lora/', 'params/'))
  kernels = sum(
    math.prod(x.shape) for name, x in pytree.items(toy.base()) if not name.endswith('/scale')
  )
  added = work(everything).model_flops - adapter_only
  assert added == 2 * ROWS * LENGTH * kernels


def test_local_layers_cost_less_and_remat_more():
  everywhere = dataclasses.replace(toy.FULL, layer_is_local=None)
  assert work(make_config()).model_flops < (work(make_config(), everywhere).model_flops)
  kept, again = work(make_config()), work(make_config(remat='full'))
  assert kept.model_flops == again.model_flops < kept.executed_flops
  assert kept.executed_flops < again.executed_flops
  assert kept.hbm_bytes < again.hbm_bytes


def test_memory_traffic_is_split_over_the_mesh():
  """Kernels over tensor, rows over fsdp; each part reads all kernels."""
  config = make_config()
  config.data.global_batch_size = 8
  whole = work(config, toy.DIVISIBLE).hbm_bytes
  split = dataclasses.replace(config, mesh=MeshConfig(tensor=2, fsdp=1))
  assert whole / 2 < work(split, toy.DIVISIBLE).hbm_bytes < whole
  by_rows = dataclasses.replace(config, mesh=MeshConfig(fsdp=2))
  assert whole / 2 < work(by_rows, toy.DIVISIBLE).hbm_bytes < whole
  parts = OptimizerConfig(accumulate_steps=2)
  in_parts = dataclasses.replace(config, optimizer=parts)
  assert work(in_parts, toy.DIVISIBLE).hbm_bytes > whole


def test_the_slowest_resource_bounds():
  chip = chips.CHIPS['v5e']
  mesh = sharding.make_mesh(MeshConfig(fsdp=2))

  def bound(flops, num_bytes, gathered):
    work = roofline.Work(flops / 2, flops, num_bytes)
    gather = hlo.Collective('all-gather', gathered, 3, np.array([[0, 1]]))
    return roofline.bound(work, [gather], chip, mesh, 1000)

  by_compute = bound(2 * chip.peak_flops, chip.hbm_bytes_per_sec / 2, 0)
  assert by_compute.bound_by == 'compute'
  assert by_compute.secs == pytest.approx(1.0)
  assert by_compute.tokens_per_sec == pytest.approx(1000)
  assert by_compute.mfu == pytest.approx(0.5)  # the rest is done twice
  by_memory = bound(chip.peak_flops, 2 * chip.hbm_bytes_per_sec, 0)
  assert by_memory.bound_by == 'HBM'
  assert by_memory.secs == pytest.approx(2.0)
  # Half of each of three results comes from the other device.
  by_links = bound(0, 0, int(chip.ici_bytes_per_sec))
  assert by_links.bound_by == 'interconnect'
  assert by_links.secs == pytest.approx(1.5)


def test_between_slices_the_network_counts():
  chip = chips.CHIPS['v5e']

  class Device:
    def __init__(self, slice_index):
      self.slice_index = slice_index

  class Mesh:
    size = 2
    devices = np.array([Device(0), Device(1)])

  gather = hlo.Collective('all-gather', 2**20, 1, np.array([[0, 1]]))
  found = roofline.bound(roofline.Work(1, 1, 1), [gather], chip, Mesh, 10)
  assert found.secs == pytest.approx(2**19 / chip.dcn_bytes_per_sec)
