"""What all commands share: signals, logs, messages."""

import io
import logging
import os
import signal
import sys

import pytest

from launch import app


def test_a_signal_asks_for_a_stop_and_handlers_come_back():
  before = signal.getsignal(signal.SIGTERM)
  with app.stop_on_signal() as should_stop:
    assert not should_stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert should_stop()
    # A second one ends the process at once.
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
  assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_may_come_while_a_line_is_logged(monkeypatch):
  """The stream that it interrupts must not be written to by the handler."""

  class Interrupted(io.RawIOBase):
    def writable(self):
      return True

    def write(self, text):
      os.kill(os.getpid(), signal.SIGTERM)
      return len(text)

  stream = io.TextIOWrapper(
    io.BufferedWriter(Interrupted()), line_buffering=True
  )
  monkeypatch.setattr(sys, 'stderr', stream)
  monkeypatch.setattr(logging.getLogger(), 'handlers', [app._Log()])
  with app.stop_on_signal() as should_stop:
    print('a line', file=sys.stderr)
    assert should_stop()
  monkeypatch.undo()


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
