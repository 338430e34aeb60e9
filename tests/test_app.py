"""What all commands share: signals, logs, messages."""

import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from launch import app


def wait_for(condition):
  """True once it is; a signal is told by a thread."""
  deadline = time.monotonic() + 20
  while not condition() and time.monotonic() < deadline:
    time.sleep(0.001)
  return condition()


def test_a_signal_asks_for_a_stop_and_handlers_come_back(capfd):
  before = signal.getsignal(signal.SIGTERM), threading.active_count()
  with app.stop_on_signal() as should_stop:
    assert not should_stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert wait_for(should_stop)
  assert 'Received SIGTERM: saving, then stopping' in capfd.readouterr().err
  assert before == (signal.getsignal(signal.SIGTERM), threading.active_count())


# A process that spends its time in one call of a library, as a compilation is.
BUSY = """
import sys
import numpy as np
from launch import app

x = np.ones((4000, 4000))
with app.stop_on_signal() as should_stop:
  print('ready', flush=True)
  for _ in range(6):
    x = x @ x
print('not reached', flush=True)
"""


def test_a_second_signal_ends_while_a_library_works():
  """Neither of the two waits until Python has its turn again."""
  process = subprocess.Popen(
    [sys.executable, '-c', BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )
  assert process.stdout.readline() == b'ready\n'
  process.send_signal(signal.SIGTERM)
  assert process.stderr.readline() == b'\n'
  assert b'Received SIGTERM' in process.stderr.readline()
  process.send_signal(signal.SIGINT)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGINT
  assert out == b''


@pytest.mark.parametrize(
  ('level', 'path', 'shown'),
  [
    (logging.INFO, '/home/me/gemma_jax/train.py', True),
    (logging.INFO, '/usr/lib/python3/site-packages/orbax/save.py', False),
    (logging.WARNING, '/usr/lib/python3/site-packages/orbax/save.py', True),
  ],
)
def test_libraries_only_warn(level, path, shown, monkeypatch):
  stderr = io.StringIO()
  monkeypatch.setattr(sys, 'stderr', stderr)
  record = logging.LogRecord('absl', level, path, 1, 'saved', (), None)
  app._Log().emit(record)
  assert ('saved' in stderr.getvalue()) == shown


@pytest.mark.parametrize('tracebacks', [False, True])
def test_tracebacks_of_libraries_are_for_debugging(tracebacks, monkeypatch):
  stderr = io.StringIO()
  monkeypatch.setattr(sys, 'stderr', stderr)
  try:
    raise OSError('disk full')
  except OSError:
    raised = sys.exc_info()
  path = '/usr/lib/python3/site-packages/orbax/save.py'
  record = logging.LogRecord(
    'absl', logging.ERROR, path, 1, 'not saved', (), raised
  )
  app._Log(tracebacks).emit(record)
  assert 'not saved' in stderr.getvalue()
  assert ('Traceback' in stderr.getvalue()) == tracebacks


def test_an_error_is_one_line():
  assert app._one_line(ValueError('a:\n  b\n')) == 'a: b'
  assert app._one_line(KeyError('no "x"')) == 'no "x"'
  assert app._one_line(ValueError()) == 'ValueError'
