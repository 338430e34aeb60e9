"""Checkpoints: exact round trips, and refusals that name the leaf."""

import json
import shutil

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import pytree
from gemma_jax.config.train import OptimizerConfig
from gemma_jax.runs import checksums
from gemma_jax.runs.checkpoint import Checkpoints
from gemma_jax.training import optimizer
from gemma_jax.training import state as state_lib


def make_state(rank=3, dtype=jnp.float32):
  """A state whose moments are not zero; one base leaf is frozen."""
  key = jax.random.key(rank)
  variables = {
    'params': {'norm': {'scale': jnp.ones(5)}},
    'lora': {'lora_a': jax.random.normal(key, (5, rank), dtype)},
  }
  tx = optimizer.make_optimizer(OptimizerConfig(), 10, ('lora/',))
  trainable, _ = state_lib.split(variables, ('lora/',))
  trainable = jax.tree.map(lambda x: x.astype(dtype), trainable)
  state = state_lib.init_state(trainable, tx)
  updates, opt_state = tx.update(trainable, state.opt_state, trainable)
  del updates
  return state.replace(step=jnp.int32(4), opt_state=opt_state)


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


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
  for (name, got), (_, want) in zip(pytree.items(restored), pytree.items(state), strict=True):
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


def two_steps(folder):
  """A workdir with the sealed steps 4 and 6; returns its checkpoint folder."""
  checkpoints = Checkpoints(str(folder))
  for step in (4, 6):
    checkpoints.save(make_state().replace(step=jnp.int32(step)), {'at': step})
  checkpoints.close()
  return folder / 'checkpoints'


def files_of(step):
  return sorted(p for p in step.rglob('*') if p.is_file())


def test_checksums_are_part_of_the_commit(tmp_path, monkeypatch):
  """They are written before the folder has its final name."""
  sealed = []
  original = checksums.seal

  def recording(folder, skip=()):
    sealed.append(folder.name)
    original(folder, skip)

  monkeypatch.setattr(checksums, 'seal', recording)
  root = two_steps(tmp_path)
  assert sealed == ['4.orbax-checkpoint-tmp', '4', '6.orbax-checkpoint-tmp', '6']
  for step in (4, 6):
    sums = json.loads((root / str(step) / checksums.CHECKSUMS).read_text())
    names = {str(p.relative_to(root / str(step))) for p in files_of(root / str(step))}
    assert sums.keys() == names - {checksums.CHECKSUMS}


@pytest.mark.parametrize('damage', ['flip', 'truncate', 'remove'])
def test_damage_in_any_file_sets_the_step_aside(tmp_path, damage, caplog):
  """For each file of a step; the older step is used, with its own values."""
  root = two_steps(tmp_path / 'whole')
  names = [p.relative_to(root / '6') for p in files_of(root / '6')]
  assert len(names) > 8
  for i, name in enumerate(names):
    workdir = tmp_path / str(i)
    shutil.copytree(root, workdir / 'checkpoints')
    path = workdir / 'checkpoints' / '6' / name
    content = bytearray(path.read_bytes())
    if damage == 'flip':
      content[len(content) // 2] ^= 16
      path.write_bytes(content)
    elif damage == 'truncate':
      path.write_bytes(content[: len(content) // 2])
    else:
      path.unlink()
    caplog.clear()
    checkpoints = Checkpoints(str(workdir))
    assert checkpoints.latest_step() == 4, name
    assert checkpoints.read_notes(4) == {'at': 4}
    checkpoints.close()
    assert (workdir / 'checkpoints' / '6.set_aside').is_dir()
    assert 'Checkpoint 6 of ' in caplog.text
    assert 'Going on from step 4' in caplog.text


def test_read_only_passes_over_damage_and_changes_nothing(tmp_path):
  root = two_steps(tmp_path)
  (root / '6' / 'notes' / 'metadata').write_text('{}')
  checkpoints = Checkpoints(str(tmp_path), read_only=True)
  assert checkpoints.latest_step() == 4
  checkpoints.close()
  assert sorted(p.name for p in root.iterdir()) == ['4', '6']


def test_a_step_set_aside_is_saved_again(tmp_path):
  root = two_steps(tmp_path)
  (root / '6' / 'notes' / 'metadata').write_text('{}')
  checkpoints = Checkpoints(str(tmp_path))
  checkpoints.save(make_state().replace(step=jnp.int32(6)), {'at': 'again'})
  checkpoints.wait()
  assert checkpoints.latest_step() == 6
  assert checkpoints.read_notes(6) == {'at': 'again'}
  checkpoints.close()
  assert checksums.newest_good(epath.Path(root)) == (6, {})


@pytest.mark.parametrize('name', ['notes/metadata', 'state/_METADATA', '_CHECKPOINT_METADATA'])
def test_an_unchecked_text_out_of_proportion_is_refused(saved, name, tmp_path):
  """Orbax would make 100 MB of it."""
  shutil.copytree(saved, tmp_path / 'run')
  step = tmp_path / 'run' / 'checkpoints' / '4'
  (step / checksums.CHECKSUMS).unlink()
  (step / name).write_text('{"a": [' + '{},' * 500_000 + '1]}')
  with pytest.raises(ValueError, match=r'checkpoint .*4: cannot be read .*its values would take'):
    Checkpoints(str(tmp_path / 'run'))


def test_an_unchecked_step_is_used_aloud_if_it_is_the_only_one(saved, caplog, tmp_path):
  shutil.copytree(saved, tmp_path / 'run')
  (tmp_path / 'run' / 'checkpoints' / '4' / checksums.CHECKSUMS).unlink()
  checkpoints = Checkpoints(str(tmp_path / 'run'))
  assert checkpoints.latest_step() == 4
  checkpoints.close()
  assert 'used unchecked' in caplog.text


def test_a_leaf_that_is_no_array_is_a_broken_folder(saved, tmp_path):
  """Without checksums, which would have found it first."""
  shutil.copytree(f'{saved}/checkpoints', tmp_path / 'checkpoints')
  step = tmp_path / 'checkpoints' / '4'
  (step / checksums.CHECKSUMS).unlink()
  names = step / 'state' / '_METADATA'
  text = names.read_text()
  names.write_text(text.replace('"value_type": "jax.Array"', '"value_type": "string"', 1))
  checkpoints = Checkpoints(str(tmp_path), read_only=True)
  for read in (checkpoints.read_leaves, lambda step: checkpoints.restore(step, make_state())):
    with pytest.raises(ValueError, match=r'checkpoint .*/4: cannot be read'):
      read(4)
  checkpoints.close()
