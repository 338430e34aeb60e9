"""Disks, signals and inputs that fail: what is promised still holds.

Some of each in little time; `python -m tests.faults` makes many of them, and
tests/faults/README.md has its figures.
"""

import ast
import functools
import json
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time
import types

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from gemma_jax.runs import train
from gemma_jax.sweep import worker as worker_lib
from tests import run_toy, sweep_toy
from tests.faults import corpora, disks, fuzz, runs, worker

pytestmark = pytest.mark.usefixtures('quick_compile')

ROOT = Path(__file__).parents[2]

needs_mount = pytest.mark.skipif(
  not disks.can_mount(), reason='a small disk needs the right to mount'
)


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp('records')
  return run_toy.config(run_toy.write_records(folder)).resolve()


@pytest.fixture(scope='module')
def undisturbed(config, tmp_path_factory):
  """The bytes that every run must end with."""
  workdir = tmp_path_factory.mktemp('undisturbed')
  train.train(config, str(workdir))
  return runs.adapter_bytes(workdir)


def at(number, action):
  """should_stop that does something when it is asked for the n-th time."""
  asked = iter(range(1, 1000))

  def should_stop():
    if next(asked) == number:
      action()
    return False

  return should_stop


def assert_said(e, workdir, words):
  """One line with the workdir, the system's words and the remedy."""
  message = str(e.value)
  assert message.startswith(f'workdir {workdir}: {words}. It keeps ')
  assert message.endswith('fix that and run the same command again.')
  assert '\n' not in message


@needs_mount
@pytest.mark.parametrize('size', [6_000, 40_000, 200_000, 330_000])
def test_a_full_disk(config, undisturbed, tmp_path, size):
  """At the first adapter, the first checkpoint and later ones."""
  with disks.small_disk(tmp_path / 'disk', size) as disk:
    workdir = disk / 'run'
    with pytest.raises(OSError) as e:
      train.train(config, str(workdir))
    assert_said(e, workdir, 'No space left on device')
    assert not (workdir / 'adapter').exists()
    step = runs.newest_step(workdir)
    assert (f'step {step}' if step else 'no checkpoint') in str(e.value)
    disks.resize(disk, 10 << 20)
    train.train(config, str(workdir))
    assert runs.adapter_bytes(workdir) == undisturbed


@needs_mount
@pytest.mark.parametrize(
  ('size', 'place', 'kept'),
  [(4_000, '', '0 finished trials'), (70_000, '/jobs/', 'no checkpoint')],
)
def test_a_full_disk_of_a_sweep(tmp_path, size, place, kept):
  """While it is planned, and at the first checkpoint of a trial."""
  records = sweep_toy.write_records(tmp_path)
  config = sweep_toy.config(records, ranks=(2,), seeds=(0,), learning_rates=(1e-3,)).resolve()
  with disks.small_disk(tmp_path / 'disk', size) as disk:
    workdir = disk / 'sweep'
    with pytest.raises(OSError) as e:
      worker_lib.run(config, str(workdir))
    message = str(e.value)
    assert message.startswith(f'workdir {workdir}{place}')
    assert f': No space left on device. It keeps {kept} and no half-written adapter; ' in message
    assert '\n' not in message
    disks.resize(disk, 10 << 20)
    (trial,) = worker_lib.run(config, str(workdir)).finished('lora')
    assert np.isfinite(trial.result['loss_adapted'])


@needs_mount
def test_a_read_only_disk(config, undisturbed, tmp_path):
  with disks.small_disk(tmp_path / 'disk', 10 << 20) as disk:
    workdir = disk / 'run'
    with pytest.raises(train.Stopped):
      train.train(config, str(workdir), stop_at(9))
    disks.remount(disk, 'ro')
    with pytest.raises(ValueError, match='not a writable folder'):
      train.train(config, str(workdir))
    disks.remount(disk, 'rw')
    train.train(config, str(workdir))
    assert runs.adapter_bytes(workdir) == undisturbed


def test_a_workdir_that_is_removed(config, tmp_path):
  workdir = tmp_path / 'run'

  def remove():  # between saves: one under way would make its folders again
    while any((workdir / 'checkpoints').glob('*tmp*')):
      time.sleep(0.01)
    while workdir.exists():
      shutil.rmtree(workdir, ignore_errors=True)

  with pytest.raises(OSError) as e:
    train.train(config, str(workdir), at(8, remove))
  assert_said(e, workdir, 'No such file or directory')


def test_a_damaged_step_costs_updates_and_nothing_else(config, undisturbed, tmp_path, caplog):
  workdir = tmp_path / 'run'
  with pytest.raises(train.Stopped):
    train.train(config, str(workdir), stop_at(9))
  newest = runs.newest_step(workdir)
  damaged = workdir / 'checkpoints' / str(newest) / 'state' / 'manifest.ocdbt'
  damaged.write_bytes(damaged.read_bytes()[::-1])
  assert runs.newest_step(workdir) < newest
  train.train(config, str(workdir))
  assert f'Checkpoint {newest} of ' in caplog.text
  assert runs.adapter_bytes(workdir) == undisturbed


def stop_at(number):
  asked = iter(range(1, number))
  return lambda: next(asked, None) is None


# Native code reads these, in some tens of milliseconds each time.
NATIVE = ('tokenizer', 'flax', 'checkpoint')


@pytest.mark.parametrize('kind', [*corpora.CORPORA])
def test_mutated_inputs_are_read_or_refused(kind, tmp_path):
  valid, folder = tmp_path / 'valid', tmp_path / 'work'
  valid.mkdir()
  corpora.CORPORA[kind].write(valid)
  shutil.copytree(valid, folder)
  refused = 0
  for trial in range(20 if kind in NATIVE else 60):
    undo = worker.damage(kind, 0, trial, folder, valid)
    try:
      corpora.CORPORA[kind].read(folder)
    except Exception as e:
      assert worker.is_ours(e, folder), f'trial {trial}: {e!r}'
      refused += 1
    undo()
  assert refused > 0


def test_a_process_of_its_own_counts_what_was_read(tmp_path):
  """As the command does it, so that a crash of native code is seen."""
  counts, problems = fuzz.fuzz('tokenizer', 60, 1, tmp_path)
  assert not counts['wrong'], problems
  assert counts['read'] + counts['refused'] == counts['trials'] == 60


@pytest.mark.parametrize(
  ('mib', 'seconds', 'problem'),
  [(50, 0, None), (76, 0, 'took 7'), (0, 1e9, 'no end after 0 s')],
)
def test_memory_and_time_are_measured_against_the_files(
  mib, seconds, problem, tmp_path, monkeypatch
):
  """64 MiB and 4 of each; the file is one of 2."""
  monkeypatch.setattr(worker, '_SECONDS', 0.2)
  monkeypatch.setattr(worker, '_SECONDS_A_MIB', 0)
  (tmp_path / 'a').write_bytes(bytes(2 << 20))

  def read(folder):
    _ = bytearray(b'x') * (mib << 20)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      pass

  tried = worker.attempt(read, tmp_path, types.SimpleNamespace())
  assert (tried.problem or '').startswith(problem or '')
  assert (tried.problem is None) is (problem is None)
  assert mib - 4 < tried.bytes / 2**20 < mib + 8
  assert tried.outcome == ('read' if not seconds else '')


EDITS = st.lists(
  st.tuples(st.floats(0, 1), st.sampled_from(('put', 'add', 'cut')), st.binary()),
  min_size=1,
  max_size=3,
)


@pytest.mark.parametrize('kind', [k for k in corpora.CORPORA if k not in NATIVE])
@settings(
  max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(choice=st.integers(0, 99), edits=EDITS)
def test_any_edit_is_read_or_refused(made, kind, choice, edits):
  """Found by hypothesis, which shows the least edit that goes wrong."""
  folder, files = made(kind)
  file = files[choice % len(files)]
  content = file.read_bytes()
  data = bytearray(content)
  for place, how, some in edits:
    at = int(place * len(data))
    end = {'put': at + len(some), 'add': at, 'cut': len(data)}[how]
    data[at:end] = some
  file.write_bytes(data)
  try:
    corpora.CORPORA[kind].read(folder)
  except Exception as e:
    assert worker.is_ours(e, folder), repr(e)
  finally:
    file.write_bytes(content)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """kind → (folder of its valid input, files in it), made once."""

  @functools.cache
  def make(kind):
    folder = tmp_path_factory.mktemp(kind)
    corpora.CORPORA[kind].write(folder)
    return folder, corpora.CORPORA[kind].files(folder)

  return make


@pytest.mark.parametrize('kind', [*corpora.CORPORA])
def test_the_valid_input_is_read(kind, tmp_path):
  """Otherwise the test above would refuse everything and say nothing."""
  corpora.CORPORA[kind].write(tmp_path)
  corpora.CORPORA[kind].read(tmp_path)


def calls(path):
  """Names of the modules that a file imports and of what it calls."""
  for node in ast.walk(ast.parse(path.read_text('utf-8'))):
    if isinstance(node, ast.Import):
      yield from (name.name.split('.')[0] for name in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      yield node.module.split('.')[0]
    elif isinstance(node, ast.Call):
      yield ast.unparse(node.func)
      for keyword in node.keywords:
        yield f'{keyword.arg}={ast.unparse(keyword.value)}'


def test_nothing_unpickles_or_evaluates():
  forbidden = {
    'pickle',
    'dill',
    'cloudpickle',
    'marshal',
    'shelve',
    'joblib',
    'eval',
    'exec',
    'allow_pickle=True',
    'torch.load',
    'yaml.load',
    'os.system',
    'shell=True',
  }
  paths = [p for name in ('gemma_jax', 'launch') for p in (ROOT / name).rglob('*.py')]
  assert len(paths) > 50
  for path in paths:
    assert not forbidden & set(calls(path)), path


@pytest.fixture(scope='module')
def disturbed(tmp_path_factory):
  return runs.Runs(tmp_path_factory.mktemp('disturbed'))


@pytest.mark.slow
def test_a_second_signal_ends_at_once_and_keeps_the_last_step(disturbed):
  workdir = disturbed.folder / 'twice'
  process = disturbed.start(workdir)
  while runs.newest_step(workdir) < 6:
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  process.send_signal(signal.SIGINT)
  process.send_signal(signal.SIGTERM)
  assert process.wait(20) - 128 in (signal.SIGTERM, signal.SIGINT)
  assert runs.newest_step(workdir) >= 6
  code, _ = disturbed.finish(workdir)
  assert code == 0
  assert disturbed.is_equal(workdir)


@pytest.mark.slow
def test_a_token_in_the_environment_is_nowhere_in_what_a_run_leaves(disturbed, monkeypatch):
  monkeypatch.setenv('HF_TOKEN', 'hf_do_not_repeat_me')
  workdir = disturbed.folder / 'secret'
  code, log = disturbed.finish(workdir)
  assert code == 0
  assert 'do_not_repeat_me' not in log
  for path in workdir.rglob('*'):
    assert path.is_dir() or b'do_not_repeat_me' not in path.read_bytes(), path


@pytest.mark.slow
def test_the_command_that_makes_the_table():
  done = subprocess.run(
    [sys.executable, '-m', 'tests.faults', '--trials=4', '--inputs=60'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  lines = [json.loads(line) for line in done.stdout.splitlines()]
  assert len(lines) == 4 + len(corpora.CORPORA)
  assert all(line['kept'] for line in lines)
