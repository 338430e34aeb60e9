"""Nobody works on what another one holds, and nothing waits for the dead."""

from concurrent import futures
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest

from gemma_jax.sweep import leases

ROOT = Path(__file__).parents[2]


def test_one_holds_and_the_other_waits_until_release(tmp_path):
  first = leases.take(tmp_path, 'a')
  assert leases.take(tmp_path, 'a') is None
  other = leases.take(tmp_path, 'b')
  assert other is not None
  first.release()
  second = leases.take(tmp_path, 'a')
  assert second is not None
  assert second.is_held()
  assert not first.is_held()
  second.release()
  other.release()


def test_a_name_that_begins_like_another_is_another_job(tmp_path):
  held = leases.take(tmp_path, 'gang-1')
  assert leases.take(tmp_path, 'gang-10') is not None
  assert leases.take(tmp_path, 'gang') is not None
  assert held.is_held()


@pytest.mark.parametrize('_', range(5))
def test_of_many_at_once_exactly_one_takes_an_expired_lease(tmp_path, _):
  dead = tmp_path / 'a.0'
  dead.write_text(json.dumps({'host': 'elsewhere', 'pid': 1, 'started': '1'}))
  os.utime(dead, (1e9, 1e9))
  with futures.ThreadPoolExecutor(16) as pool:
    found = list(pool.map(lambda _: leases.take(tmp_path, 'a'), range(16)))
  assert sum(lease is not None for lease in found) == 1


def test_a_lease_of_another_machine_holds_until_it_is_old(tmp_path):
  path = tmp_path / 'a.3'
  path.write_text(json.dumps({'host': 'elsewhere', 'pid': 1, 'started': '1'}))
  assert leases.take(tmp_path, 'a') is None
  os.utime(path, (time.time() - 61, time.time() - 61))
  assert leases.take(tmp_path, 'a', expiry_secs=90) is None
  taken = leases.take(tmp_path, 'a', expiry_secs=60)
  assert taken.path.name == 'a.4'


def test_the_holder_keeps_it_alive(tmp_path):
  lease = leases.take(tmp_path, 'a', expiry_secs=0.4)
  for _ in range(4):
    time.sleep(0.25)
    assert leases.take(tmp_path, 'a', expiry_secs=0.4) is None
  lease.release()


def test_a_process_killed_while_it_looks_at_the_clock_leaves_nothing(tmp_path):
  code = (
    'import os, pathlib, signal; from gemma_jax.sweep import leases; '
    'kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL); '
    f'os.fstat = pathlib.Path.stat = kill; leases._now(pathlib.Path({str(tmp_path)!r}))'
  )
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=False)
  assert done.returncode == -signal.SIGKILL
  assert not list(tmp_path.iterdir())
  assert abs(leases._now(tmp_path) - time.time()) < 2


def test_a_killed_process_of_this_machine_holds_nothing(tmp_path):
  code = (
    'import sys, time; from gemma_jax.sweep import leases; '
    f'leases.take({str(tmp_path)!r}, "a"); print("held", flush=True); '
    'time.sleep(99)'
  )
  holder = subprocess.Popen(
    [sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  assert holder.stdout.readline() == 'held\n'
  assert leases.take(tmp_path, 'a') is None
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  assert leases.take(tmp_path, 'a') is not None
