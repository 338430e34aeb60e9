"""The launcher of several processes, with programs that need no JAX."""

from pathlib import Path
import signal
import subprocess
import sys

import pytest

ROOT = Path(__file__).parents[2]

# Which process this is, and how often all were started before.
PREAMBLE = """
import os, pathlib, signal, sys, time
flags = dict(x[2:].split('=') for x in sys.argv[1:] if '=' in x)
me = int(flags['process_id'])
mine = pathlib.Path('started_{}'.format(me))
start = int(mine.read_text()) if mine.exists() else 0
mine.write_text(str(start + 1))
"""


def launch(folder, program, processes=2, max_restarts=2):
  path = folder / 'program.py'
  path.write_text(PREAMBLE + program)
  return subprocess.Popen(
    [
      sys.executable,
      '-m',
      'launch.local_multihost',
      f'--processes={processes}',
      '--devices=3',
      f'--max_restarts={max_restarts}',
      '--',
      sys.executable,
      str(path),
    ],
    cwd=folder,
    env={'PYTHONPATH': str(ROOT), 'PATH': '/usr/bin:/bin'},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def starts(folder):
  """How often each process was started."""
  found = sorted(folder.glob('started_*'))
  return [int(path.read_text()) for path in found]


def test_each_process_knows_the_others(tmp_path):
  out, log = launch(
    tmp_path,
    "print(*sys.argv[1:], os.environ['JAX_NUM_CPU_DEVICES'],"
    " os.environ['NPROC'])\n"
    "print('log', me, file=sys.stderr)\n",
    processes=3,
  ).communicate(timeout=60)
  (line,) = out.splitlines()  # of process 0 alone
  address, count, me, _, devices, threads = line.split()
  assert address.startswith('--coordinator_address=127.0.0.1:')
  assert (count, me, devices) == ('--num_processes=3', '--process_id=0', '3')
  assert int(threads) >= 6  # two for each device: one may wait, one computes
  assert {f'[{i}] log {i}' for i in range(3)} <= set(log.splitlines())
  assert starts(tmp_path) == [1, 1, 1]


def test_all_start_again_when_one_is_killed(tmp_path):
  process = launch(
    tmp_path,
    'if start == 0 and me == 1: os.kill(os.getpid(), signal.SIGKILL)\n'
    'if start == 0: time.sleep(1); os.abort()  # as JAX does\n',
  )
  _, log = process.communicate(timeout=60)
  assert process.returncode == 0, log
  assert 'a process ended with exit code 137' in log
  assert 'restarting all of them (1 of 2)' in log
  assert starts(tmp_path) == [2, 2]


def test_there_is_a_limit(tmp_path):
  process = launch(tmp_path, 'os.abort()\n')
  _, log = process.communicate(timeout=60)
  assert process.returncode == 134, log
  assert starts(tmp_path) == [3, 3]


@pytest.mark.parametrize('code', [1, 75])
def test_what_a_restart_cannot_help_is_reported(tmp_path, code):
  process = launch(tmp_path, f'sys.exit({code})\n')
  process.communicate(timeout=60)
  assert process.returncode == code
  assert starts(tmp_path) == [1, 1]


def test_signals_go_on_to_all(tmp_path):
  process = launch(
    tmp_path,
    'signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n'
    "print('ready', file=sys.stderr, flush=True)\n"
    'time.sleep(60)\n',
  )
  ready = 0
  while ready < 2:
    ready += 'ready' in process.stderr.readline()
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  assert process.returncode == 75
  assert starts(tmp_path) == [1, 1]


def test_a_command_is_needed():
  done = subprocess.run(
    [sys.executable, '-m', 'launch.local_multihost'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1
  assert 'command: missing, expected one after --' in done.stderr
