"""Where leaves live, and that a mesh changes no result."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
import numpy as np
import pytest

from gemma_jax import pytree
from gemma_jax.config.train import LoraConfig, MeshConfig, OptimizerConfig
from gemma_jax.lora import factors
from gemma_jax.model import layout
from gemma_jax.tpu import topology
from gemma_jax.training import optimizer, sharding
from gemma_jax.training import state as state_lib
from tests import toy

pytestmark = pytest.mark.usefixtures('quick_compile')

CUBE = MeshConfig(data=2, fsdp=2, tensor=2)
CONFIG = toy.DIVISIBLE


class TestMesh:
  def test_axes_are_auto(self):
    """jax.make_mesh's own default is Explicit, which linen cannot trace."""
    mesh = sharding.make_mesh(CUBE)
    assert mesh.axis_names == ('data', 'fsdp', 'tensor')
    assert mesh.axis_types == (AxisType.Auto,) * 3

  @pytest.mark.parametrize(
    ('sizes', 'shape'),
    [
      ((1, -1, 1), (1, 8, 1)),
      ((-1, 2, 2), (2, 2, 2)),
      ((2, 4, -1), (2, 4, 1)),
      ((8, 1, 1), (8, 1, 1)),
    ],
  )
  def test_minus_one_takes_what_is_left(self, sizes, shape):
    mesh = sharding.make_mesh(MeshConfig(*sizes))
    assert tuple(mesh.shape.values()) == shape

  @pytest.mark.parametrize('sizes', [(3, -1, 1), (4, 4, 1), (16, -1, 1)])
  def test_sizes_that_do_not_fit_are_refused(self, sizes):
    with pytest.raises(ValueError, match=r'mesh: got data=.*8, the number of'):
      sharding.make_mesh(MeshConfig(*sizes))

  @pytest.mark.aot
  def test_replicas_alone_go_across_slices(self):
    devices = topology.parse('2xv5e:2x2').devices()
    mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=-1), devices)
    assert tuple(mesh.shape.values()) == (4, 2, 1)
    slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)
    np.testing.assert_array_equal(slices[:2], np.full((2, 2, 1), slices[0, 0]))
    np.testing.assert_array_equal(slices[2:], np.full((2, 2, 1), slices[2, 0]))
    assert slices[0, 0] != slices[2, 0]
    with pytest.raises(ValueError, match='got 1, expected a multiple of 2'):
      sharding.make_mesh(MeshConfig(), devices)

  def test_rows_must_divide(self):
    mesh = sharding.make_mesh(CUBE)
    sharding.check_batch(mesh, 12, 'rows')
    with pytest.raises(ValueError, match=r'rows: got 6 .* data x fsdp = 4'):
      sharding.check_batch(mesh, 6, 'rows')


class TestPlacing:
  def test_rows_of_a_batch(self):
    mesh = sharding.make_mesh(CUBE)
    rows = np.arange(12 * 5, dtype=np.int32).reshape(12, 5)
    np.testing.assert_array_equal(sharding.local_rows(mesh, 12), np.arange(12))
    batch = sharding.put_batch({'tokens': rows}, mesh, 12)
    assert batch['tokens'].sharding == sharding.batch_sharding(mesh)
    np.testing.assert_array_equal(batch['tokens'], rows)

  def test_arrays_that_every_process_has(self):
    mesh = sharding.make_mesh(CUBE)
    placed = {'a': jax.NamedSharding(mesh, PartitionSpec('tensor')), 'b': sharding.replicated(mesh)}
    tree = {'a': np.arange(6.0), 'b': jnp.float32(7)}
    got = sharding.put(tree, placed)
    for name, x in got.items():
      assert x.sharding == placed[name]
      np.testing.assert_array_equal(x, tree[name])


class TestSpecs:
  SIZES = layout.axis_sizes(CONFIG)

  @pytest.mark.parametrize(
    ('letters', 'spec'),
    [
      ('VD', ('tensor', 'fsdp')),
      ('LNDH', (None, 'tensor', 'fsdp', None)),
      ('LKDH', (None, None, 'fsdp', None)),  # 3 kv heads: each shard has all
      ('LNHD', (None, 'tensor', None, 'fsdp')),
      ('LDF', (None, 'fsdp', 'tensor')),
      ('LD', (None, 'fsdp')),
      ('', ()),
    ],
  )
  def test_letters_to_mesh_axes(self, letters, spec):
    mesh = sharding.make_mesh(CUBE)
    got = sharding.param_spec(letters, self.SIZES, mesh)
    assert got == PartitionSpec(*spec)

  def test_kv_heads_are_split_where_they_divide(self):
    mesh = sharding.make_mesh(CUBE)
    sizes = {**self.SIZES, 'K': 4}
    assert sharding.param_spec('KDH', sizes, mesh) == PartitionSpec('tensor', 'fsdp', None)

  def test_a_size_that_does_not_divide_is_refused_by_name(self):
    mesh = sharding.make_mesh(MeshConfig(tensor=4, fsdp=2))
    with pytest.raises(ValueError, match=r'mesh.tensor: got 4, .* axis F = 34'):
      sharding.param_spec('DF', self.SIZES, mesh)

  def test_two_letters_on_one_mesh_axis_are_refused(self):
    mesh = sharding.make_mesh(CUBE)
    with pytest.raises(ValueError, match=r'F and N of a parameter \[FN\] are both'):
      sharding.param_spec('FN', self.SIZES, mesh)
    rules = sharding.Rules(N='fsdp')
    assert rules.axes('LNH') == [None, 'fsdp', None]
    with pytest.raises(ValueError, match=r'N and D .* split over mesh axis fsdp'):
      rules.axes('LNDH')

  @pytest.mark.parametrize('factorization', ['matrix', 'keras'])
  @pytest.mark.parametrize('scan_layers', [True, False])
  def test_adapters_lie_everywhere_or_as_the_base(self, factorization, scan_layers):
    mesh = sharding.make_mesh(CUBE)
    config = LoraConfig(rank=2, targets='all', factorization=factorization)
    tree = {'lora': factors.init(jax.random.key(0), CONFIG, config, scan_layers)}
    everywhere = sharding.tree_shardings(tree, CONFIG, mesh)
    for name, x in pytree.items(everywhere):
      assert x.spec == PartitionSpec(), name
    split = dict(pytree.items(sharding.tree_shardings(tree, CONFIG, mesh, config)))
    prefix, layer = ('lora/layers', (None,)) if scan_layers else ('lora/layer_1', ())
    wanted = {
      'attn/o/lora_a': ('tensor', None, None),
      'attn/o/lora_b': (None, 'fsdp'),
      'mlp/up/lora_a': ('fsdp', None),
      'mlp/up/lora_b': (None, 'tensor'),
    }
    if factorization == 'keras':
      wanted['attn/q/lora_a'] = ('tensor', 'fsdp', None)
      wanted['attn/q/lora_b'] = (None, None)
      wanted['attn/o/lora_a'] = ('tensor', None, None)
    else:
      wanted['attn/q/lora_a'] = ('fsdp', None)
      wanted['attn/q/lora_b'] = (None, 'tensor', None)
    for name, spec in wanted.items():
      assert split[f'{prefix}/{name}'].spec == PartitionSpec(*layer, *spec), name

  def test_every_leaf_of_a_state(self):
    """Moments of a trained kernel lie as the kernel; adapters everywhere."""
    mesh = sharding.make_mesh(CUBE)
    patterns = ('lora/', 'params/layers/mlp/up', 'params/final_norm')
    variables = {'params': toy.base(CONFIG), 'lora': toy.factors(CONFIG)}
    leaves, frozen = state_lib.split(variables, patterns)
    tx = optimizer.make_optimizer(OptimizerConfig(), 3, patterns)
    state = state_lib.init_state(leaves, tx)
    placed = sharding.tree_shardings((state, frozen), CONFIG, mesh)
    wanted = {
      'mlp/up/w': PartitionSpec(None, 'fsdp', 'tensor'),
      'final_norm/scale': PartitionSpec('fsdp'),
      'input_embedding': PartitionSpec('tensor', 'fsdp'),
      'attn/q/w': PartitionSpec(None, 'tensor', 'fsdp', None),
      'lora_a': PartitionSpec(),
      'lora_b': PartitionSpec(),
      'count': PartitionSpec(),
      'step': PartitionSpec(),
    }
    seen = set()
    for name, leaf in pytree.items(placed):
      for end, spec in wanted.items():
        if name.endswith(end):
          assert leaf.spec == spec, name
          seen.add((end, name.split('/')[1]))
    assert {end for end, _ in seen} == wanted.keys()
    assert {part for end, part in seen if end == 'mlp/up/w'} == {'trainable', 'opt_state'}


# Kernels whose inputs, outputs or neither are split over `tensor`.
LORA = LoraConfig(rank=3, targets='q|v|down')
TRAINABLE = ('lora/', 'params/layers/attn/q', 'params/layers/attn/k')


@pytest.fixture(scope='module')
def variables():
  return {'params': toy.base(CONFIG), 'lora': toy.factors(CONFIG, LORA)}


def train(variables, mesh=None, accumulate_steps=1):
  batches = [toy.batch(rows=8, seed=i, vocab_size=58) for i in range(3)]
  return toy.train(
    variables,
    batches,
    config=CONFIG,
    lora_config=LORA,
    optimizer_config=dataclasses.replace(toy.ADAMW, accumulate_steps=accumulate_steps),
    trainable=TRAINABLE,
    mesh=mesh,
  )


def first_moments(run):
  leaves = toy.optimizer_leaves(run.state)
  return {name: x for name, x in leaves.items() if '/mu/' in name}


@pytest.fixture(scope='module')
def unsharded(variables):
  return train(variables)


@pytest.mark.parametrize(
  ('sizes', 'accumulate_steps'), [((2, 2, 2), 1), ((8, 1, 1), 1), ((1, 8, 1), 1), ((2, 2, 2), 2)]
)
def test_a_mesh_changes_no_result(variables, unsharded, sizes, accumulate_steps):
  mesh = sharding.make_mesh(MeshConfig(*sizes))
  run = train(variables, mesh, accumulate_steps)
  for got, want in zip(run.metrics, unsharded.metrics, strict=True):
    toy.assert_close(got, want, 1e-5)
  # Moments are linear in the gradients; AdamW's updates divide by their size,
  # which turns the rounding of a gradient near zero into a step.
  toy.assert_close(first_moments(run), first_moments(unsharded), 1e-5)
  assert run.traces == 1
  kernel = run.state.trainable['params']['layers']['attn']['q']['w']
  held = math.prod(kernel.addressable_shards[0].data.shape)
  assert kernel.size == held * sizes[1] * sizes[2]
  for name, x in pytree.items(run.state.trainable['lora']):
    assert x.is_fully_replicated, name


def test_the_frozen_base_is_bit_equal_on_a_mesh(variables):
  mesh = sharding.make_mesh(CUBE)
  run = train(variables, mesh)
  for name, x in pytree.items(run.frozen):
    before = dict(pytree.items(variables))[name]
    assert jnp.issubdtype(x.dtype, jnp.float32), name
    np.testing.assert_array_equal(jax.device_get(x), before, err_msg=name)
