"""Checkpoints: exact round trips, and refusals that name the leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import optimizer, pytree, train_state
from gemma_jax.checkpoint import Checkpoints
from gemma_jax.config import OptimizerConfig


def make_state(rank=3, dtype=jnp.float32):
  """A state whose moments are not zero; one base leaf is frozen."""
  key = jax.random.key(rank)
  variables = {
    'params': {'norm': {'scale': jnp.ones(5)}},
    'lora': {'lora_a': jax.random.normal(key, (5, rank), dtype)},
  }
  tx = optimizer.make_optimizer(OptimizerConfig(), 10, ('lora/',))
  trainable, _ = train_state.split(variables, ('lora/',))
  trainable = jax.tree.map(lambda x: x.astype(dtype), trainable)
  state = train_state.init_state(trainable, tx)
  updates, opt_state = tx.update(trainable, state.opt_state, trainable)
  del updates
  return state.replace(step=jnp.int32(4), opt_state=opt_state)


def abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A workdir with one checkpoint of step 4."""
  folder = str(tmp_path_factory.mktemp('run'))
  checkpoints = Checkpoints(folder)
  checkpoints.save(make_state(), {'found': {'tokens': 11}})
  checkpoints.close()
  return folder


def test_restores_every_leaf_bit_for_bit(saved):
  checkpoints = Checkpoints(saved)
  state = make_state()
  assert checkpoints.latest_step() == 4
  assert checkpoints.read_notes(4) == {'found': {'tokens': 11}}
  restored = checkpoints.restore(4, abstract(state))
  checkpoints.close()
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  for (name, got), (_, want) in zip(
    pytree.items(restored), pytree.items(state), strict=True
  ):
    np.testing.assert_array_equal(got, want, err_msg=name)
    assert got.dtype == want.dtype


@pytest.mark.parametrize(
  ('state', 'message'),
  [
    (lambda: make_state(rank=2), r'lora_a is float32 \(5, 3\), expected'),
    (lambda: make_state(dtype=jnp.bfloat16), 'expected bfloat16'),
  ],
)
def test_other_shapes_and_dtypes_are_refused(saved, state, message):
  checkpoints = Checkpoints(saved)
  with pytest.raises(ValueError, match=message):
    checkpoints.restore(4, abstract(state()))
  checkpoints.close()


def test_missing_leaves_are_refused(saved):
  checkpoints = Checkpoints(saved)
  state = make_state()
  more = state.replace(trainable={**state.trainable, 'extra': jnp.zeros(2)})
  with pytest.raises(ValueError, match=r"lacks \['trainable/extra'\]"):
    checkpoints.restore(4, abstract(more))
  checkpoints.close()


def test_the_frozen_base_is_not_saved(saved):
  checkpoints = Checkpoints(saved)
  leaves = pytree.items(checkpoints._manager.item_metadata(4)['state'].tree)
  checkpoints.close()
  assert not [name for name, _ in leaves if 'norm' in name]


def test_an_unfinished_save_is_ignored(tmp_path):
  checkpoints = Checkpoints(str(tmp_path))
  checkpoints.save(make_state(), {})
  checkpoints.close()
  torn = tmp_path / 'checkpoints' / '9.orbax-checkpoint-tmp'
  torn.mkdir()
  (torn / 'state').write_bytes(b'half')
  checkpoints = Checkpoints(str(tmp_path))
  assert checkpoints.latest_step() == 4
  checkpoints.close()
