"""What all commands share: signals, logs, messages, whole files."""

import io
import json
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


def test_an_error_is_one_line():
  assert app._one_line(ValueError('a:\n  b\n')) == 'a: b'
  assert app._one_line(KeyError('no "x"')) == 'no "x"'
  assert app._one_line(ValueError()) == 'ValueError'


def test_lines_are_written_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'a.jsonl'
  app.write_lines(str(path), [{'text': '서울'}, {'n': 1}])
  assert path.read_text('utf-8') == '{"text": "서울"}\n{"n": 1}\n'
  with pytest.raises(TypeError):
    app.write_lines(str(path), [{'n': 2}, {'not': object()}])
  assert json.loads(path.read_text('utf-8').splitlines()[1]) == {'n': 1}
