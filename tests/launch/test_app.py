"""What all commands share: signals, logs, messages."""

import contextlib
import io
import logging
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from gemma_jax.config import train as config_lib
from gemma_jax.config.sweep import SweepConfig
from launch import app, messages


def wait_for(condition):
  """True once it is; a signal is told by a thread."""
  deadline = time.monotonic() + 20
  while not condition() and time.monotonic() < deadline:
    time.sleep(0.001)
  return condition()


def signal_state():
  """What a signal meets in this process, and who listens."""
  wakeup = signal.set_wakeup_fd(-1)
  signal.set_wakeup_fd(wakeup)
  handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  return wakeup, handlers, threading.active_count()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop_and_handlers_come_back(number, capfd):
  before = signal_state()
  for _ in range(2):
    with app.stop_on_signal() as should_stop:
      assert not should_stop()
      os.kill(os.getpid(), number)
      assert wait_for(should_stop)
    said = f'Received {number.name}: saving, then stopping'
    assert capfd.readouterr().err.count(said) == 1
    assert signal_state() == before


def test_handlers_come_back_from_an_error():
  before = signal_state()
  with pytest.raises(RuntimeError), app.stop_on_signal():
    raise RuntimeError
  assert signal_state() == before


def test_other_signals_ask_for_nothing():
  """Those with a handler are told to the same thread, with or without name."""
  other, heard = signal.SIGRTMIN + 1, []
  before = signal.signal(other, lambda number, frame: heard.append(number))
  try:
    with app.stop_on_signal() as should_stop:
      os.kill(os.getpid(), other)
      assert wait_for(lambda: heard == [other])
      assert not should_stop()
      os.kill(os.getpid(), signal.SIGTERM)
      assert wait_for(should_stop)
  finally:
    signal.signal(other, before)


# A process that is in one call of a library, as a compilation is, for longer
# than a test waits.
IN_A_LIBRARY = """
import hashlib
import os
import sys
import time
from launch import app

if sys.argv[1] == 'full':
  os.set_blocking(2, False)
  try:
    while True:
      os.write(2, b'.')
  except BlockingIOError:
    os.set_blocking(2, True)
with app.stop_on_signal() as should_stop:
  print('ready', flush=True)
  while sys.argv[1] != 'read' and not should_stop():
    time.sleep(0.01)
  print('working', flush=True)
  hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)
"""


@contextlib.contextmanager
def in_a_library(stderr):
  process = subprocess.Popen(
    [sys.executable, '-c', IN_A_LIBRARY, stderr], stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )
  try:
    assert process.stdout.readline() == b'ready\n'
    yield process
  finally:
    process.kill()
    process.communicate()


def test_a_second_signal_ends_while_a_library_works():
  """Neither of the two waits until Python has its turn again."""
  with in_a_library('read') as process:
    assert process.stdout.readline() == b'working\n'
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == b'\n'
    assert b'Received SIGTERM' in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 128 + signal.SIGINT


@pytest.mark.parametrize('stderr', ['gone', 'full'])
def test_signals_are_heard_where_nobody_reads_what_is_said(stderr):
  with in_a_library(stderr) as process:
    if stderr == 'gone':
      process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == b'working\n'  # should_stop() is true
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
  ('level', 'path', 'shown'),
  [
    (logging.INFO, '/home/me/gemma_jax/runs/train.py', True),
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
  record = logging.LogRecord('absl', logging.ERROR, path, 1, 'not saved', (), raised)
  app._Log(tracebacks).emit(record)
  assert 'not saved' in stderr.getvalue()
  assert ('Traceback' in stderr.getvalue()) == tracebacks


def test_lines_of_a_log_on_a_full_disk_are_given_up(tmp_path, caplog):
  log = app._LogFile()
  (tmp_path / 'log.txt').symlink_to('/dev/full')
  log.open(tmp_path)  # no link is followed
  log = app._LogFile()
  with open('/dev/full', 'wb') as full:
    log.write = lambda text: log._append(full.fileno(), text)
    log.write('a')
    log.write('b')
  said = 'log.txt: {}; the run goes on without it.'
  assert caplog.messages == [
    said.format('Too many levels of symbolic links'),
    said.format('No space left on device'),
  ]


def test_an_error_is_one_line():
  assert messages.one_line(ValueError('a:\n  b\n')) == 'a: b'
  assert messages.one_line(KeyError('no "x"')) == 'no "x"'
  assert messages.one_line(ValueError()) == 'ValueError'


def test_advice_names_flags_of_the_command():
  """Every setting in a message is a field; remedies are flags that the command has."""
  advice = set()
  for path in (Path(app.__file__).parents[1] / 'gemma_jax').rglob('*.py'):
    text = path.read_text(encoding='utf-8')
    assert '--config.' not in text or path.parent.name == 'config', path
    settings = r'\b(?:data|model|lora|optimizer|mesh|grid)\.[a-z_0-9]+(?==[^ =])'
    advice |= set(re.findall(settings, text))
  assert len(advice) > 5
  fields = config_lib.flatten(SweepConfig().to_dict())
  assert advice <= fields.keys()
  script = """
from absl import flags
from launch import messages, {}
flags.FLAGS(['x'])
print(messages.own_flags('a data.skip_bad_records=True b data.seq_len=5; model.tokenizer=PATH, '
  'data.eval_path, data.template = x, eval_every_steps=7 or eval_every_steps.'))
"""
  for command, shown in {
    'evaluate': '--skip_bad_records=True b --seq_len=5; --tokenizer=PATH, data.eval_path, '
    '--template = x, eval_every_steps=7 or eval_every_steps.\n',
    'train': '--config.data.skip_bad_records=True b --config.data.seq_len=5; '
    '--config.model.tokenizer=PATH, data.eval_path, data.template = x, '
    '--config.eval_every_steps=7 or eval_every_steps.\n',
  }.items():
    run = [sys.executable, '-c', script.replace('{}', command)]
    done = subprocess.run(run, capture_output=True, check=True, text=True)
    assert done.stdout == f'a {shown}'


@pytest.mark.parametrize(
  ('command', 'given', 'shown'),
  [
    ('evaluate', '', '--template: x; --data, --model, (--tokenizer), --dtype.'),
    ('generate', '', '--template: x; data.path, --model, (--tokenizer), --weights.'),
    ('convert', '', 'data.template: x; data.path, --model, (--tokenizer), --dtype.'),
    ('summary', '', 'data.template: x; data.path, model.path, (model.tokenizer), model.dtype.'),
    ('summary', '--model=m', 'data.template: x; data.path, --model, (model.tokenizer), model.d'),
    ('train', '--workdir=w', 'data.template: x; data.path, model.path, (model.tokenizer), mod'),
  ],
)
def test_messages_name_the_settings_of_the_command(command, given, shown):
  kept = " /a/data.template model.layers.0 'data.template' data.template/b model.dtype.gz"
  script = f"""
from absl import flags
from launch import messages, {command}
flags.FLAGS(['x', *{given.split()}])
said = messages.own_flags('top_p: got 2')
assert said == ('--' if {command == 'generate'} else '') + 'top_p: got 2'
print(messages.own_flags('data.template: x; data.path, model.path, (model.tokenizer), model.dtype.')
      + {kept!r})
"""
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, check=True, text=True)
  assert done.stdout.startswith(shown)
  assert done.stdout.endswith(kept + '\n')


def test_a_library_task_that_fails_is_logged_without_its_traceback():
  """Orbax writes in tasks; on a full disk several fail, and asyncio tells of each."""
  script = """
import asyncio, gc
from absl import flags
from launch import app

async def write():
  raise ValueError('disk full')

async def main():
  task = asyncio.create_task(write())
  await asyncio.sleep(0.01)
  del task
  gc.collect()

flags.FLAGS(['app'])
app._set_up_log()
asyncio.run(main())
"""
  done = subprocess.run(
    [sys.executable, '-c', script],
    capture_output=True,
    check=True,
    text=True,
    cwd=Path(app.__file__).parents[1],
  )
  assert 'Task exception was never retrieved' in done.stderr
  assert 'Traceback' not in done.stderr


def test_late_writes_of_a_checkpoint_have_no_traceback_and_other_errors_do():
  """TensorStore's threads hand what they cannot raise to `sys.unraisablehook`."""
  script = """
from absl import flags
from launch import app

class Late:
  def __init__(self, text):
    self.text = text
  def __del__(self):
    raise RuntimeError(self.text)

flags.FLAGS(['app'])
app._set_up_log()
Late('Event loop is closed')
print('--', file=__import__('sys').stderr)
Late('another error')
"""
  done = subprocess.run(
    [sys.executable, '-c', script],
    capture_output=True,
    check=True,
    text=True,
    cwd=Path(app.__file__).parents[1],
  )
  late, other = done.stderr.split('--\n')
  assert 'A write of a checkpoint ended' in late
  assert 'Traceback' not in late
  assert 'Traceback' in other


LOGS = """
import os
import sys
from absl import logging
from launch import app

def main():
  with open(os.devnull) as f:
    print(f.fileno(), flush=True)
  sys.stdin.readline()
  logging.info('a line')
  print('a bar', end='', file=sys.stderr, flush=True)
  print('the result')
  if FAILS:
    raise ValueError('what is wrong')

app.run(main)
"""


@pytest.mark.parametrize('end', ['closed', 'gone', 'full', 'read'])
@pytest.mark.parametrize('code', [0, 1])
def test_a_log_that_nobody_reads_ends_nothing(end, code):
  """And is not on standard output, nor in a file that took its number."""
  program = LOGS.replace('FAILS', str(bool(code)))
  to = {'closed': '2>&-', 'full': '2>/dev/full'}.get(end, '')
  command = ['bash', '-c', f'exec "$@" {to}', 'bash']
  process = subprocess.Popen(
    [*command, sys.executable, '-c', program],
    cwd=Path(__file__).parents[2],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  number = process.stdout.readline()
  assert int(number) > 2
  if end == 'gone':
    process.stderr.close()
    process.stderr = None
  out, err = process.communicate('go on\n')
  assert (process.returncode, out) == (code, 'the result\n')
  if end == 'read':
    assert ' a line\na bar' in err
    assert ('error: what is wrong' in err) is bool(code)


# One function is compiled three times; the second time its entry is damaged.
COMPILES = """
import sys
from pathlib import Path
from launch import app

app.set_compilation_cache(sys.argv[1])
import jax
import warnings

jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
compiled = jax.jit(lambda x: x * 2)
for text in ('new', 'damaged', 'again'):
  print(text, file=sys.stderr)
  assert compiled(3.0) == 6
  (entry,) = Path(sys.argv[1]).glob('jit__lambda*-cache')
  if text == 'new':
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2])
  assert text == 'new' or len(entry.read_bytes()) > len(whole) // 2
  jax.clear_caches()
warnings.warn('another one')
"""


def test_a_damaged_entry_of_the_compilation_cache_is_replaced_and_said_once(tmp_path):
  run, here = [sys.executable, '-c', COMPILES, tmp_path], Path(app.__file__).parents[1]
  done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=here)
  lines = done.stderr.splitlines()
  said = f'WARNING:absl:Replacing a damaged entry of jit__lambda in {tmp_path}.'
  assert lines[:4] == ['new', 'damaged', said, 'again']
  assert 'UserWarning: another one' in lines[4]
