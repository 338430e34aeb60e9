"""What every command shares: flags parsed, errors in one line, exit codes.

Exit code 0; 1 with one clear line on standard error (a traceback only with
`--debug`); 75 when a signal stopped a run that saved and can be resumed; 128
plus its number (130 for Ctrl-C, 143 for SIGTERM) when a second one ended it.
Standard output carries the result, standard error the log, both in UTF-8.
"""

import collections
from collections.abc import Callable, Iterator
import contextlib
import io
import logging as standard_logging
import os
import re
import select
import shlex
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn, TypeVar
import warnings

from absl import app, flags, logging
import tqdm

from launch import messages

_DEBUG = flags.DEFINE_bool('debug', False, 'Show the traceback of an error instead of one line.')

# Help for the flags that several commands share.
ADAPTER_HELP = 'PEFT folder, or .lora.h5 file of Keras'
MODEL_HELP = (
  'Base: gemma3_270m, a .gguf file, a Hugging Face or Flax release folder, '
  'hf:OWNER/NAME, or random:VARIANT.'
)
TOKENIZER_HELP = 'tokenizer.model to use instead of the one of the base.'

# Flags whose values are text rather than file names.
_TEXT_FLAGS = ('prompt', 'context', 'system', 'record')

_Config = TypeVar('_Config')

EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: try the same command again
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# What a user's input or a full disk raises, with a message that stands alone;
# anything else is shown with the name of its type.
USER_ERRORS = (ValueError, OSError, KeyError, FloatingPointError)

# JAX's warning of an entry of the compilation cache, by its function.
_DAMAGED_ENTRY = re.compile(r"Error reading persistent compilation cache entry for '(\w+)'")


def run(main: Callable[[], int | None]) -> None:
  """Parses the flags, runs main() and exits with its code."""

  def guarded(argv):
    if len(argv) > 1:
      fail(f'argument: got {argv[1]!r}, expected flags only; see --help.')
    _set_up_log()
    try:
      return main() or 0
    except KeyboardInterrupt:
      sys.exit(130)
    except Exception as e:
      if _DEBUG.value:
        raise
      if isinstance(e, AssertionError | RuntimeError):
        _check_platform()
      if isinstance(e, USER_ERRORS):
        fail(messages.one_line(e))
      fail(f'{type(e).__name__}: {messages.one_line(e)} (--debug shows where)')

  _set_up_streams()
  # --help lists the flags of the command's own file and those declared here.
  flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS['debug'])
  app.run(guarded, flags_parser=_parse)


class _Unread(io.FileIO):
  """A stream whose reader may leave, or disk fill up: what is written then is lost, no more."""

  def write(self, content: Any) -> int | None:
    try:
      return super().write(content)
    except OSError:  # a closed pipe, a full disk, a terminal that hung up
      return len(content)


def _set_up_streams():
  """Text is UTF-8, whatever the locale; no log ends with its reader."""
  for name in ('stdin', 'stdout', 'stderr'):
    if getattr(sys, name) is None:  # it was closed; else the next file has its number
      mode = 'r' if name == 'stdin' else 'w'
      setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding='utf-8'))
  if sys.stderr is sys.__stderr__:
    unread = io.BufferedWriter(_Unread(sys.stderr.fileno(), 'w', closefd=False))
    sys.stderr = io.TextIOWrapper(unread, 'utf-8', 'backslashreplace', line_buffering=True)
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(encoding='utf-8', errors='backslashreplace')


def fail(message: str) -> NoReturn:
  """Prints one line and exits with code 1."""
  _LOG_FILE.write(f'error: {message}')
  print(f'error: {message}', file=sys.stderr, flush=True)
  jax = sys.modules.get('jax')  # not imported for this
  if jax is not None and jax.distributed.is_initialized():
    # A regular exit would wait for the other processes, which may wait for this
    # one. The coordinator exits last, so that all have time to report their error.
    time.sleep(jax.process_index() == 0)
    os._exit(1)
  sys.exit(1)


def log_to(folder: str) -> None:
  """Goes on logging to log.txt in a folder too, from the first line on; not in gs://."""
  if '://' not in folder:
    _LOG_FILE.open(folder)


def python() -> str:
  """This interpreter, as the next command has to spell it."""
  here = os.path.relpath(sys.executable)
  return shlex.quote(sys.executable if here.startswith('..') else here)


def _check_platform() -> None:
  """Fails if JAX has no device of the platforms that it was told to take.

  JAX itself says so with an assertion, for one.
  """
  wanted = os.environ.get('JAX_PLATFORMS')
  if wanted and 'jax' in sys.modules:
    try:
      sys.modules['jax'].devices()
    except Exception:
      fail(
        f'JAX_PLATFORMS: got {wanted!r}, but JAX finds no such device here; unset it, or install '
        "what the device needs (pip install -e '.[cuda]' or '.[tpu]')."
      )


def config_of(kind: type[_Config], config: Any) -> _Config:
  """Returns --config, which must be of the kind that a command takes."""
  getattr(config, 'resolve', None)  # a file that did not load raises here
  if not isinstance(config, kind):
    fail(
      f'--config: got a {type(config).__name__}, expected a {kind.__name__}. launch.train runs '
      'a TrainConfig (experiments/dolly_lora.py), launch.sweep a SweepConfig '
      '(experiments/rank_ablation.py).'
    )
  return config


def set_compilation_cache(folder: str) -> None:
  """Keeps compiled programs in a folder; '' is the default one, 'off' none."""
  if folder == 'off':
    return
  import jax  # late, so that signals are handled early

  folder = folder or os.path.expanduser('~/.cache/gemma_jax/compiled')
  jax.config.update('jax_compilation_cache_dir', folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  warnings.showwarning = _replacing_damaged(folder, warnings.showwarning)


def _replacing_damaged(folder: str, show: Callable[..., None]) -> Callable[..., None]:
  """`warnings.showwarning` that makes room for what JAX compiles again.

  JAX checks an entry as it decompresses it, but writes over none. Its warning names
  a function, not a file: all entries of that function go.
  """
  from gemma_jax import files  # late, as above

  def remove_or_show(message, *args, **kwargs):
    damaged = _DAMAGED_ENTRY.match(str(message))
    try:
      for entry in files.path(folder).glob(f'{damaged[1]}-*-cache') if damaged else ():
        entry.unlink(missing_ok=True)
    except OSError:
      damaged = None
    if damaged:
      logging.warning('Replacing a damaged entry of %s in %s.', damaged[1], folder)
    else:
      show(message, *args, **kwargs)

  return remove_or_show


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
  """Makes SIGTERM and Ctrl-C ask for a stop; a second one ends at once.

  Python runs a signal's handler between two of its own instructions, so only
  after a running compilation or step, and then once for all pending signals.
  A thread, woken by the system's handler, does not wait for that: it reports the
  signal, and at the second one ends the process with 128 plus the signal's
  number, the exit code that a shell gives to a process ended by a signal.

  Yields:
    should_stop(), true once a signal has come.
  """
  stopping = threading.Event()
  numbers, from_handler = socket.socketpair()
  from_handler.setblocking(False)

  def watch():
    with numbers:
      while number := numbers.recv(1):
        if number[0] not in _STOP_SIGNALS:
          continue  # another signal, which Python handles
        if stopping.is_set():
          os._exit(128 + number[0])
        stopping.set()
        _say_at_once(
          f'\n{time.strftime("%H:%M:%S")} Received '
          f'{signal.Signals(number[0]).name}: saving, then stopping. A second '
          'one ends at once.\n'
        )

  # Undone in reverse order, each registered as soon as there is something to undo:
  # Ctrl-C may arrive between any two lines.
  with contextlib.ExitStack() as undo:
    undo.enter_context(from_handler)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    undo.callback(watcher.join)
    undo.callback(from_handler.shutdown, socket.SHUT_WR)
    undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(-1))
    signal.set_wakeup_fd(from_handler.fileno(), warn_on_full_buffer=False)
    for each in _STOP_SIGNALS:
      undo.callback(signal.signal, each, signal.getsignal(each))
      # Without a Python handler the system would not call Python's own at all.
      signal.signal(each, lambda number, frame: None)
    yield stopping.is_set


def _say_at_once(text: str) -> None:
  """Writes to standard error, unless that would wait for a reader.

  Not through sys.stderr, whose lock another thread may hold for long.
  """
  with contextlib.suppress(OSError):  # there may be no reader left
    _, writable, _ = select.select([], [2], [], 0)
    if writable:
      os.write(2, text.encode())


class _LogFile:
  """A run's log.txt, which has the lines of all its processes, one after the other.

  A run does not end because a line could not be written.
  """

  def __init__(self):
    early = self._early = collections.deque(maxlen=1000)  # most commands have no file
    self.write: Callable[[str], None] = lambda text: early.append(text)

  def open(self, folder: str) -> None:
    """Appends to the folder's log.txt from now on, and what was said before."""
    # No link is followed, and no reader of a pipe waited for.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
      descriptor = os.open(os.path.join(folder, 'log.txt'), flags, 0o666)
    except OSError as e:
      self._give_up(e)
      return
    self.write = lambda text: self._append(descriptor, text)
    while self._early:
      self.write(self._early.popleft())

  def _append(self, descriptor: int, text: str) -> None:
    line = f'{time.strftime("%Y-%m-%d")} {text}\n'
    try:
      os.write(descriptor, line.encode('utf-8', 'backslashreplace'))
    except OSError as e:
      self._give_up(e)

  def _give_up(self, e: OSError) -> None:
    self.write = lambda text: None
    logging.warning('log.txt: %s; the run goes on without it.', e.strerror)


_LOG_FILE = _LogFile()


class _Log(standard_logging.Handler):
  """Our log lines on standard error, above a progress bar if there is one, and in log.txt.

  Of the libraries below us only warnings are shown, in one line each: Orbax logs
  thirty lines per checkpoint, and the traceback of whatever it raises.
  """

  def __init__(self, tracebacks: bool = False):
    super().__init__()
    self._tracebacks = tracebacks

  def emit(self, record):
    # The standard library's asyncio reports tasks that failed in those libraries.
    ours = '-packages' not in record.pathname and record.name != 'asyncio'
    if not ours and not self._tracebacks:
      record.exc_info = record.exc_text = None
    if ours or record.levelno >= standard_logging.WARNING:
      text = messages.own_flags(self.format(record))
      tqdm.tqdm.write(text, file=sys.stderr)
      _LOG_FILE.write(text)


def _set_up_log():
  handler = _Log(tracebacks=_DEBUG.value)
  handler.setFormatter(standard_logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
  root = standard_logging.getLogger()
  root.handlers = [handler]
  root.setLevel(standard_logging.INFO)
  logging.set_verbosity(logging.INFO)
  if not _DEBUG.value:
    sys.unraisablehook = _without_late_writes(sys.unraisablehook)


def _without_late_writes(hook: Callable[[Any], None]) -> Callable[[Any], None]:
  """`sys.unraisablehook` that passes over what comes after an error that is said.

  Where one write of a checkpoint fails, Orbax closes its event loop, and
  TensorStore's threads report the other writes to the closed loop.
  """

  def hook_or_line(unraisable):
    error = unraisable.exc_value
    if isinstance(error, RuntimeError) and str(error) == 'Event loop is closed':
      logging.info('A write of a checkpoint ended after another one had failed.')
    else:
      hook(unraisable)

  return hook_or_line


def _parse(argv):
  with errors_of_flags():
    rest = flags.FLAGS(argv)
    for name in _TEXT_FLAGS:
      value = flags.FLAGS[name].value if name in flags.FLAGS else None
      if value:
        flags.FLAGS[name].value = _as_text(value)
    return rest


@contextlib.contextmanager
def errors_of_flags() -> Iterator[None]:
  """Says in one line what is wrong with a command's flags.

  For their parsing, and for the definition of a config flag with a default, which
  reads the fields on the command line at once.
  """
  try:
    yield
  except SystemExit:  # --help has printed its text, and ends with 1 in absl
    sys.exit(0)
  except flags.Error as e:  # an unknown flag or a value of another type
    fail(f'{messages.one_line(e)} See --help.')
  except Exception as e:  # an experiment file that does not load, a wrong field
    if '--debug' in sys.argv:
      raise
    kind = '' if isinstance(e, USER_ERRORS) else f'--config: {type(e).__name__}: '
    fail(f'{kind}{messages.one_line(e)}')


def _as_text(value: str | list[str]) -> str | list[str]:
  """Decodes as UTF-8 a flag whose bytes the locale could not decode.

  File names need no decoding: they go back to the system unchanged.
  """

  def text(given: str) -> str:
    is_raw = any('\udc80' <= x <= '\udcff' for x in given)
    return os.fsencode(given).decode('utf-8', 'replace') if is_raw else given

  return [text(each) for each in value] if isinstance(value, list) else text(value)
