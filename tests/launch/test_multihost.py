"""Several processes train one run, as the hosts of a pod slice do."""

import json
import os
from pathlib import Path
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma_jax import files
from gemma_jax.data import examples
from gemma_jax.runs import metrics, train
from gemma_jax.runs import prepare as run_lib
from gemma_jax.runs import workdir as workdir_lib
from tests import gcs_toy, run_toy

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures('quick_compile')

FIELDS = {'mesh.data': -1, 'mesh.fsdp': 2, 'data.global_batch_size': 4}


@pytest.fixture(scope='module')
def records(tmp_path_factory):
  """19 training records, some 5 to a step: an epoch ends within 5 steps."""
  return run_toy.write_records(tmp_path_factory.mktemp('records'))


def alone(records, workdir, should_stop=lambda: False, **fields):
  """The same run in one process, on four devices."""
  config = run_toy.config(records)
  run_toy.set_fields(config, FIELDS | fields | {'mesh.data': 2})
  return train.train(config.resolve(), str(workdir), should_stop)


def environment():
  return os.environ | {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}


class Pod:
  """A training command as several processes; `pids` as they are started."""

  def __init__(self, records, workdir, processes, devices, remote=None, **fields):
    workdir.mkdir(parents=True, exist_ok=True)
    config = run_toy.config_file(workdir, records, **FIELDS | fields)
    command = ['-m', 'launch.train', f'--config={config}']
    self.process = subprocess.Popen(
      [
        sys.executable,
        '-m',
        'launch.local_multihost',
        f'--processes={processes}',
        f'--devices={devices}',
        '--max_restarts=1',
        '--',
        sys.executable,
        *command,
        f'--workdir={remote or workdir}',
      ],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=environment(),
    )
    line = self.process.stderr.readline()
    self.pids = [int(pid) for pid in re.findall(r'\d+', line)]
    assert len(self.pids) == processes, line

  def wait(self):
    """(exit code, result on standard output or None, log)."""
    out, log = self.process.communicate(timeout=300)
    # Only process 0 has something to say, besides the transport below JAX,
    # whose threads write into each other's lines.
    lines = [x for x in out.splitlines() if x.startswith('{')]
    assert len(lines) <= 1, lines
    result = json.loads(lines[0]) if lines else None
    return self.process.returncode, result, log


def losses(workdir):
  rows = metrics.read(f'{workdir}/metrics.jsonl')
  return {r['step']: r['loss_nats_per_token'] for r in rows if 'tokens' in r}


def assert_same_run(workdir, other):
  """Same tokens, and losses within 1e-5 of max(1, loss)."""
  for name in ('steps', 'tokens'):
    got, want = (workdir_lib.read_json(str(w), 'result.json')[name] for w in (workdir, other))
    assert got == want, name
  got, want = losses(workdir), losses(other)
  assert got.keys() == want.keys()
  for step, loss in want.items():
    assert abs(got[step] - loss) <= 1e-5 * max(1, loss), step


def adapter_bytes(workdir):
  return (workdir / 'adapter' / 'adapter_model.safetensors').read_bytes()


def wait_for_steps(workdir, count):
  deadline = time.monotonic() + 200
  path = workdir / 'metrics.jsonl'
  while not path.exists() or len(path.read_text().splitlines()) < count:
    assert time.monotonic() < deadline
    time.sleep(0.02)


BATCHES = """
from absl import app
import numpy as np

from launch import multihost


def main(argv):
  multihost.join()
  from gemma_jax.data import pipeline
  from gemma_jax.runs import hosts
  from gemma_jax.runs import prepare as run_lib
  from gemma_jax.training import sharding
  from tests import run_toy

  config = run_toy.config(argv[1])
  run_toy.set_fields(config, {fields})
  made = run_lib.prepare(config.resolve())
  rows = sharding.local_rows(made.base.mesh, 4)
  assert len(rows) < 4
  seen = [
    hosts.to_numpy(sharding.put_batch(batch, made.base.mesh, 4))
    for _, batch in pipeline.train_batches(made.data.train, made.plan, 0, 12, rows)
  ]
  if hosts.is_lead():
    np.savez(argv[2], **{{n: np.stack([b[n] for b in seen]) for n in seen[0]}})


app.run(main)
"""


@pytest.mark.parametrize('processes', [2, pytest.param(4, marks=pytest.mark.multihost)])
def test_global_batches_are_those_of_one_process(records, tmp_path, processes):
  """Token for token, over the ends of two epochs."""
  program, out = tmp_path / 'program.py', tmp_path / 'batches.npz'
  program.write_text(BATCHES.format(fields=FIELDS))
  code = subprocess.run(
    [
      sys.executable,
      '-m',
      'launch.local_multihost',
      '--max_restarts=0',
      f'--processes={processes}',
      f'--devices={4 // processes}',
      '--',
      sys.executable,
      str(program),
      records,
      str(out),
    ],
    cwd=ROOT,
    env=environment() | {'PYTHONPATH': str(ROOT)},
    timeout=120,
    check=False,
  ).returncode
  assert code == 0
  config = run_toy.config(records)
  run_toy.set_fields(config, FIELDS | {'mesh.data': 2})
  run = run_lib.prepare(config.resolve())
  assert run.plan.rows_per_epoch(0) + run.plan.rows_per_epoch(1) < 12 * 4
  with np.load(out) as seen:
    for step in range(12):
      rows = run.plan.rows(step)
      batch = examples.make_batch(run.data.train, rows, run.plan.seq_len)
      assert batch.keys() == seen.keys()
      for name, x in batch.items():
        np.testing.assert_array_equal(seen[name][step], x, err_msg=name)


def test_two_processes_train_what_one_does(records, tmp_path):
  alone(records, tmp_path / 'one')
  pod = Pod(records, tmp_path / 'two', 2, 2)
  code, result, log = pod.wait()
  assert code == 0, log
  assert result['steps'] == 7
  assert_same_run(tmp_path / 'two', tmp_path / 'one')
  heldout = [workdir_lib.read_heldout(str(tmp_path / name), 7) for name in ('two', 'one')]
  for got, want in zip(*heldout, strict=True):
    np.testing.assert_allclose(got.pop('nll'), want.pop('nll'), rtol=1e-4)
    assert got == want
  assert 'Step 7: held-out loss' in log
  assert not re.search(r'^\[1\] \d\d:\d\d:\d\d', log, re.MULTILINE)


@pytest.mark.multihost
@pytest.mark.parametrize(('processes', 'devices'), [(2, 2), (4, 1), (4, 2)])
def test_twenty_steps_on_any_number_of_hosts(records, tmp_path, processes, devices):
  fields = {'steps': 20, 'data.global_batch_size': 8}
  alone(records, tmp_path / 'one', **fields)
  pod = Pod(records, tmp_path / 'pod', processes, devices, **fields)
  code, _, log = pod.wait()
  assert code == 0, log
  assert len(losses(tmp_path / 'pod')) == 20
  assert_same_run(tmp_path / 'pod', tmp_path / 'one')


@pytest.mark.multihost
@pytest.mark.parametrize('mesh', [(1, 2, 2), (2, 1, 2), (1, 1, 4)])
def test_hosts_may_hold_the_same_rows(tmp_path, mesh):
  """With tensor parallelism over hosts, rows are not theirs alone."""
  records = tmp_path / 'records.jsonl'
  rng = np.random.default_rng(0)
  rows = [{'tokens': rng.integers(4, 500, 7 + i).tolist()} for i in range(20)]
  files.write_json_lines(records, rows)
  base = {'model.path': str(ROOT / 'tests/golden/parity/gemma2')}
  names = ('mesh.data', 'mesh.fsdp', 'mesh.tensor')
  fields = dict(zip(names, mesh, strict=True))
  alone(str(records), tmp_path / 'one', **base)
  pod = Pod(str(records), tmp_path / 'pod', 4, 1, **fields, **base)
  code, _, log = pod.wait()
  assert code == 0, log
  assert_same_run(tmp_path / 'pod', tmp_path / 'one')


@pytest.mark.multihost
def test_an_adapter_in_parts_is_written_whole(records, tmp_path):
  """No process has all of it; with it, a trained kernel in parts."""
  fields = {'trainable': ('lora/', 'params/layers/mlp/up')}
  alone(records, tmp_path / 'one', **fields)
  fields |= {'mesh.shard_adapter': True}
  code, _, log = Pod(records, tmp_path / 'pod', 4, 1, **fields).wait()
  assert code == 0, log
  assert_same_run(tmp_path / 'pod', tmp_path / 'one')
  for name in ('adapter_model', 'trained_base'):
    got, want = (
      load_file(tmp_path / run / 'adapter' / f'{name}.safetensors') for run in ('pod', 'one')
    )
    assert got.keys() == want.keys()
    # AdamW turns the rounding of a gradient near zero into a step, so that
    # single numbers differ; parts that were mixed up would differ in most.
    for leaf, x in want.items():
      assert np.linalg.norm(got[leaf] - x) < 1e-2 * np.linalg.norm(x), leaf


@pytest.mark.multihost
def test_hosts_share_an_object_store(records, tmp_path):
  alone(records, tmp_path / 'one')
  with gcs_toy.server():
    remote = f'{gcs_toy.BUCKET}/run'
    pod = Pod(records, tmp_path / 'pod', 2, 2, remote=remote)
    code, result, log = pod.wait()
    assert code == 0, log
    assert_same_run(remote, tmp_path / 'one')
    assert files.fetch(result['adapter']).is_dir()


@pytest.fixture(scope='module')
def undisturbed(records, tmp_path_factory):
  """A run of two processes to its end."""
  workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
  code, _, log = Pod(records, workdir, 2, 2, steps=41).wait()
  assert code == 0, log
  return workdir


@pytest.mark.multihost
@pytest.mark.parametrize('victim', [0, 1])
def test_kill_and_supervised_restart(records, undisturbed, tmp_path, victim):
  pod = Pod(records, tmp_path / 'run', 2, 2, steps=41)
  wait_for_steps(tmp_path / 'run', 9)
  subprocess.run(['kill', '-9', str(pod.pids[victim])], check=True)
  code, result, log = pod.wait()
  assert code == 0, log
  assert 'restarting all of them (1 of 1)' in log
  assert 'Resumed from step' in log
  assert result['steps'] == 41
  assert adapter_bytes(tmp_path / 'run') == adapter_bytes(undisturbed)


@pytest.mark.multihost
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_host_stops_all_at_one_step(records, undisturbed, tmp_path, number):
  pod = Pod(records, tmp_path / 'run', 2, 2, steps=41)
  wait_for_steps(tmp_path / 'run', 9)
  subprocess.run(['kill', f'-{number}', str(pod.pids[1])], check=True)
  code, result, log = pod.wait()
  assert (code, result) == (75, None), log
  assert 'Stopped at step' in log
  code, _, log = Pod(records, tmp_path / 'run', 2, 2, steps=41).wait()
  assert code == 0, log
  assert adapter_bytes(tmp_path / 'run') == adapter_bytes(undisturbed)


@pytest.mark.multihost
def test_resumes_on_other_numbers_of_hosts(records, undisturbed, tmp_path):
  """Two processes, then one, then four."""
  run = tmp_path / 'run'
  pod = Pod(records, run, 2, 2, steps=41)
  wait_for_steps(run, 9)
  pod.process.send_signal(signal.SIGTERM)  # which goes on to all
  assert pod.wait()[0] == 75
  asked = iter(range(9))
  with pytest.raises(train.Stopped):
    alone(records, run, lambda: next(asked, None) is None, steps=41)
  code, _, log = Pod(records, run, 4, 1, steps=41).wait()
  assert code == 0, log
  assert_same_run(run, undisturbed)


def call(config, workdir, port, process_id, *flags, home=None):
  """One process of a run, started by hand."""
  return subprocess.Popen(
    [
      sys.executable,
      '-m',
      'launch.train',
      f'--config={config}',
      f'--workdir={workdir}',
      f'--coordinator_address=127.0.0.1:{port}',
      '--num_processes=2',
      f'--process_id={process_id}',
      *flags,
    ],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=environment()
    | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'}
    | ({'HOME': str(home)} if home else {}),
  )


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def refusals(processes):
  """The error line of each, all of which must end with exit code 1."""
  errors = []
  for process in processes:
    _, log = process.communicate(timeout=120)
    assert process.returncode == 1, log
    errors += [x for x in log.splitlines() if x.startswith('error: ')]
  assert len(errors) == len(processes)
  return errors


def test_a_coordinator_that_does_not_answer(records, tmp_path):
  config = run_toy.config_file(tmp_path, records, **FIELDS)
  process = call(config, tmp_path / 'run', free_port(), 1, '--join_timeout_secs=1')
  (error,) = refusals([process])
  assert 'not all of the 2 processes reached' in error
  assert not (tmp_path / 'run').exists()


@pytest.mark.multihost
def test_a_process_that_never_comes(records, tmp_path):
  config = run_toy.config_file(tmp_path, records, **FIELDS)
  process = call(config, tmp_path / 'run', free_port(), 0, '--join_timeout_secs=3')
  (error,) = refusals([process])
  assert 'not all of the 2 processes reached' in error


@pytest.mark.multihost
def test_hosts_that_disagree_are_both_named(records, tmp_path):
  config = run_toy.config_file(tmp_path, records, **FIELDS)
  port = free_port()
  errors = refusals(
    [call(config, tmp_path / 'run', port, i, f'--config.lora.rank={5 + i}') for i in range(2)]
  )
  for error in errors:
    assert re.search(
      r'config: lora\.rank is 5 on process 0 \(.*, fingerprint \w{16}\) and 6 '
      r'on process 1 \(.*, fingerprint \w{16}\)',
      error,
    )
  assert not (tmp_path / 'run').exists()


@pytest.mark.multihost
def test_hosts_with_other_records_are_refused(records, tmp_path):
  """The path is the same, what lies there is not."""
  config = run_toy.config_file(tmp_path, '~/records.jsonl', **FIELDS)
  port = free_port()
  processes = []
  for i in range(2):
    home = tmp_path / str(i)
    home.mkdir()
    run_toy.write_records(home, count=20 + i)
    processes.append(call(config, tmp_path / 'run', port, i, home=home))
  for error in refusals(processes):
    assert 'inputs: data is' in error


@pytest.mark.multihost
def test_a_workdir_of_each_host_is_refused(records, tmp_path):
  config = run_toy.config_file(tmp_path, records, **FIELDS)
  port = free_port()
  errors = refusals([call(config, tmp_path / f'run{i}', port, i) for i in range(2)])
  for error in errors:
    assert 'which process 1 (' in error
    assert 'does not share with process 0' in error
  assert not list(tmp_path.glob('run*/*'))
