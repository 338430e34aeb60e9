"""What a compiled step keeps in memory, and the remat policy that follows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import pytree
from gemma_jax.config.train import LoraConfig, MeshConfig, OptimizerConfig
from gemma_jax.lora import factors as factors_lib
from gemma_jax.model import layout
from gemma_jax.model.transformer import Transformer
from gemma_jax.training import compiler, optimizer, sharding
from gemma_jax.training import state as state_lib
from gemma_jax.training import step as step_lib
from gemma_jax.training.model import Model
from tests import toy

pytestmark = pytest.mark.usefixtures('quick_compile')

# Kernels that are large beside the activations of a few tokens.
CONFIG = dataclasses.replace(toy.PLAIN, embed_dim=64, hidden_dim=509, num_layers=7)
MESH = sharding.make_mesh(MeshConfig(1, 1, 1))


class Compiled:
  """A LoRA step for rows [1, T], and the sizes of what it is given."""

  def __init__(self, remat='full', length=7, dtype=jnp.float32, options=None):
    config = CONFIG
    tx = optimizer.make_optimizer(OptimizerConfig(), 3, ('lora/',))
    factors = jax.eval_shape(
      lambda: factors_lib.init(jax.random.key(0), config, LoraConfig(rank=2))
    )
    variables = {'params': layout.abstract_params(config, dtype)}
    leaves, frozen = state_lib.split({**variables, 'lora': factors}, ('lora/',))
    state = jax.eval_shape(lambda t: state_lib.init_state(t, tx), leaves)
    step = step_lib.make_train_step(
      Model(Transformer(config, remat=remat)), step_lib.token_loss, lambda _: (tx, None)
    )
    hyper = step_lib.Hyperparameters(jax.ShapeDtypeStruct((), jnp.float32))
    step = jax.jit(step, donate_argnums=0, compiler_options=options)
    self.program = step.lower(state, hyper, frozen, toy.batch(1, length)).compile()
    self.analysis = self.program.memory_analysis()
    self.state_bytes = pytree.num_bytes(state)
    self.base_bytes = pytree.num_bytes(frozen)


@pytest.fixture(scope='module')
def step():
  return Compiled()


def test_the_state_is_donated_and_nothing_else_comes_out(step):
  kept = step.analysis.output_size_in_bytes - step.analysis.alias_size_in_bytes
  assert step.analysis.alias_size_in_bytes >= step.state_bytes
  assert kept < 1024  # the metrics


def test_gradients_and_moments_are_of_the_trainable_leaves_only(step):
  """A gradient of the base would take as much as the base."""
  assert step.state_bytes < 0.1 * step.base_bytes
  assert step.analysis.temp_size_in_bytes < 0.3 * step.base_bytes


def test_a_bfloat16_base_is_not_widened_as_a_whole():
  """Its kernels are cast layer by layer; a float32 copy would be twice it."""
  options = compiler.options('cpu')
  narrow = Compiled(dtype=jnp.bfloat16, options=options)
  assert narrow.analysis.temp_size_in_bytes < 0.6 * narrow.base_bytes
  wide = Compiled(dtype=jnp.bfloat16)
  assert wide.analysis.temp_size_in_bytes > 1.5 * narrow.base_bytes


def test_auto_remat_takes_the_first_policy_that_fits(monkeypatch):
  compiled = {name: Compiled(name, 61).program for name in ('dots', 'full')}
  needed = {k: compiler.memory_bytes(v) for k, v in compiled.items()}
  assert needed['full'] < needed['dots']
  asked = []

  def compile_with(model):
    asked.append(model.remat)
    return compiled[model.remat]

  def chosen(remat, limit):
    monkeypatch.setattr(compiler, 'memory_limit_bytes', lambda mesh: limit)
    asked.clear()
    model = Transformer(CONFIG)
    program = compiler.with_remat(model, remat, MESH, compile_with)
    assert program is compiled[asked[-1]]
    return asked[-1]

  assert chosen('auto', needed['dots']) == 'dots'
  assert chosen('auto', needed['dots'] - 1) == 'full'
  assert chosen('auto', None) == 'dots'
  assert chosen('full', needed['dots']) == 'full'
  assert asked == ['full']


def test_keeping_less_takes_less_memory():
  sizes = [Compiled(name, 61).analysis.temp_size_in_bytes for name in ('full', 'dots', 'none')]
  assert sizes == sorted(sizes)
  assert sizes[0] < 0.7 * sizes[1] and sizes[1] < 0.7 * sizes[2]


def test_a_host_has_the_memory_that_the_kernel_says():
  limit = compiler.memory_limit_bytes(MESH)
  with open('/proc/meminfo') as file:
    total = 1024 * int(file.readline().split()[1])
  # JAX shows eight devices on this host; the mesh's one has all of it.
  assert 0.5 * total < limit < total


def test_a_step_has_a_program_for_each_form_of_batch_that_it_meets():
  compiled = []

  def compile_for(batch):
    compiled.append(jax.tree.map(lambda x: (x.shape, x.dtype.name), batch))
    double = jax.jit(lambda factor, batch: jax.tree.map(lambda x: factor * x, batch))
    return double.lower(3, batch).compile()

  step = compiler.ByShape(compile_for)
  assert compiled == []
  # From shapes, before any batch is there.
  step.program({'tokens': jax.ShapeDtypeStruct((2, 8), jnp.int32)})
  for length in (4, 8, 4):
    tokens = jnp.arange(2 * length).reshape(2, length)
    np.testing.assert_array_equal(step(3, {'tokens': tokens})['tokens'], 3 * tokens)
  by_length = [{'tokens': ((2, length), 'int32')} for length in (8, 4)]
  assert compiled == by_length
  # Another dtype, another structure: a program of their own.
  step(3, {'tokens': tokens.astype(jnp.float32)})
  step(3, {'pair': (tokens, tokens)})
  step(3, {'tokens': tokens})
  assert compiled == [
    *by_length,
    {'tokens': ((2, 4), 'float32')},
    {'pair': (((2, 4), 'int32'), ((2, 4), 'int32'))},
  ]
