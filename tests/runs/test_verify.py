"""launch.verify: a line per step, and arithmetic that repeats itself."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from gemma_jax.config import train as config_lib
from gemma_jax.runs import prepare as run_lib
from gemma_jax.runs import train, verify
from gemma_jax.runs.checkpoint import Checkpoints
from tests import run_toy
from tests.launch.test_launch import call

pytestmark = pytest.mark.usefixtures('quick_compile')


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """Workdir of a run that keeps its steps 2 and 3."""
  folder = tmp_path_factory.mktemp('verify')
  config = run_toy.config(run_toy.write_records(folder), steps=3)
  train.train(config.resolve(), str(folder / 'run'))
  return folder / 'run'


@pytest.fixture
def workdir(finished, tmp_path):
  """A copy that may be damaged."""
  return shutil.copytree(finished, tmp_path / 'run')


def save_again(workdir, step, change):
  """Replaces a step by a changed one whose checksums are right."""
  config = json.loads((workdir / 'run.json').read_text())['config']
  run = run_lib.prepare(config_lib.from_dict(config).resolve())
  checkpoints = Checkpoints(str(workdir), read_only=True)
  state = checkpoints.restore(step, run.program.abstract[0])
  notes = checkpoints.read_notes(step)
  checkpoints.close()
  shutil.rmtree(workdir / 'checkpoints' / str(step))
  checkpoints = Checkpoints(str(workdir))
  checkpoints.save(*change(state, notes))
  checkpoints.close()


def add_to_factors(state, value):
  trainable = jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(value), state.trainable)
  return state.replace(trainable=trainable)


def test_a_line_per_step_and_bit_equality(workdir, monkeypatch):
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*')}
  done = call('verify', str(workdir), '--replay')
  assert done.returncode == 0, done.stderr
  first, second, replayed = done.stdout.splitlines()
  assert first.startswith('step 2: ok, ')
  assert second.startswith('step 3: ok, ')
  assert replayed == ('step 3: ok, computed again from step 2: all bits are equal')
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob('*')} == before


def test_another_bit_in_a_saved_factor_is_found_by_replaying(workdir):
  """The checksums are right, the arithmetic is not."""
  save_again(workdir, 3, lambda state, notes: (add_to_factors(state, 1e-6), notes))
  assert all(finding.is_good for finding in verify.check(str(workdir)))
  replayed = verify.replay(str(workdir))
  assert not replayed.is_good
  assert "bits differ in ['trainable/lora/" in replayed.text


def test_replaying_on_other_records_is_refused(workdir, tmp_path):
  facts = json.loads((workdir / 'run.json').read_text())
  facts['config']['data']['path'] = run_toy.write_records(tmp_path, count=19)
  (workdir / 'run.json').write_text(json.dumps(facts))
  with pytest.raises(ValueError, match='its data had the fingerprint'):
    verify.replay(str(workdir))


def test_values_that_are_not_finite_are_bad(workdir):
  save_again(workdir, 3, lambda state, notes: (add_to_factors(state, jnp.nan), notes))
  good, bad = verify.check(str(workdir))
  assert good.is_good
  assert not bad.is_good
  assert 'are not finite' in bad.text


@pytest.mark.parametrize(('name', 'verb'), [('config', 'differs'), ('fingerprints', 'differ')])
def test_notes_of_another_run_are_bad(workdir, name, verb):
  save_again(workdir, 3, lambda state, notes: (state, {**notes, name: {}}))
  _, bad = verify.check(str(workdir))
  assert str(bad) == f'step 3: BAD, its {name} {verb} from run.json'


def test_a_damaged_file_is_bad_and_stays_where_it_is(workdir):
  path = workdir / 'checkpoints' / '2' / 'state' / 'manifest.ocdbt'
  path.write_bytes(path.read_bytes()[:-1])
  bad, good = verify.check(str(workdir))
  assert not bad.is_good
  assert 'state/manifest.ocdbt has ' in bad.text
  assert good.is_good
  assert path.exists()
  with pytest.raises(ValueError, match=r'got 1 good checkpoint'):
    verify.replay(str(workdir))


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r'has no run\.json'):
    list(verify.check(str(tmp_path)))
