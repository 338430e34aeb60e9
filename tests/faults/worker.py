"""Reads mutated inputs in a process of its own, and watches what happens.

  python -m tests.faults.worker FORMAT SEED FIRST LAST FOLDER

A line of JSON for each trial that went wrong, and one with the counts at the
end. A trial may take 64 MiB and 4 times its files, and 10 s of processor time and
2 s for each of their MiB. FOLDER/progress holds the trial that is under way, for the caller that
finds this process dead.
"""

import collections
from collections.abc import Callable
import ctypes
import json
import os
from pathlib import Path
import re
import resource
import shutil
import signal
import sys
import time
from typing import NamedTuple

import numpy as np

from tests.faults import corpora, mutate

_MORE_BYTES, _TIMES_ITS_FILES = 64 << 20, 4
_SECONDS, _SECONDS_A_MIB = 10, 2
_INFLATED = 0.01  # of the trials
_EXECUTES = (
  'os.exec',
  'os.fork',
  'os.posix_spawn',
  'os.system',
  'pickle.find_class',
  'socket.connect',
  'subprocess.Popen',
)
_CHANGES = ('os.mkdir', 'os.remove', 'os.rename', 'os.rmdir', 'os.symlink')


class TooSlow(BaseException):
  """A trial took more than its time; nothing may catch it."""


class Watch:
  """Events of the interpreter that a reader must not cause."""

  def __init__(self, folder: Path):
    self.events: list[str] = []
    self.is_on = False
    self._folder = str(folder)
    sys.addaudithook(self._hook)

  def _hook(self, event, arguments):
    if not self.is_on:
      return
    if event in _EXECUTES + _CHANGES:
      self.events.append(f'{event} {arguments!r:.200}')
    elif event == 'open':
      path, mode, flags = arguments
      writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
      if writes or (isinstance(mode, str) and set(mode) & set('wax+')):
        self.events.append(f'open {path!r} {mode!r}')
      elif isinstance(path, str) and path.startswith('/etc/passwd'):
        self.events.append(f'open {path!r}')


def damage(kind: str, seed: int, trial: int, folder: Path, valid: Path):
  """Makes FOLDER the valid input with one file mutated, or one missing."""
  corpus = corpora.CORPORA[kind]
  rng = np.random.default_rng([seed, trial])
  files = corpus.files(valid)
  chosen = files[int(rng.integers(len(files)))]
  target = folder / chosen.relative_to(valid)
  content = chosen.read_bytes()
  if rng.random() < 0.02:
    target.unlink()
  elif rng.random() < _INFLATED:
    target.write_bytes(mutate.inflate(rng, content, chosen.name))
  else:
    target.write_bytes(mutate.mutate(rng, content, chosen.name))

  def undo():
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)

  return undo


def is_ours(e: BaseException, folder: Path) -> bool:
  """An error that names the file or the setting, in one of our two kinds."""
  if not isinstance(e, ValueError | OSError):
    return False
  if isinstance(e, UnicodeError | json.JSONDecodeError):
    return False
  message = str(e)
  return str(folder) in message or bool(re.match(r'[a-z0-9_.]+: ', message))


def main(kind: str, seed: int, first: int, last: int, root: Path) -> None:
  """Runs the trials first, ..., last - 1."""
  valid, folder = root / 'valid', root / f'work{os.getpid()}'
  shutil.copytree(valid, folder)
  read = corpora.CORPORA[kind].read
  for _ in range(2):  # imports and caches are not what is measured
    read(folder)
  _limit_memory()
  watch = Watch(folder)
  before = {p.name for p in root.iterdir()}
  counts = collections.Counter()
  peak, slowest = 0, 0.0
  for trial in range(first, last):
    (root / 'progress').write_text(str(trial))
    undo = damage(kind, seed, trial, folder, valid)
    watch.events.clear()
    tried = attempt(read, folder, watch)
    undo()
    if tried.outcome:
      counts[tried.outcome] += 1
    peak, slowest = max(peak, tried.bytes), max(slowest, tried.seconds)
    problem = tried.problem
    if watch.events:
      problem = f'did {watch.events[:3]}'
    if {p.name for p in root.iterdir()} != before:
      problem = f'left {sorted(p.name for p in root.iterdir())}'
    if problem:
      counts['wrong'] += 1
      print(json.dumps({'trial': trial, 'problem': problem}), flush=True)
  shutil.rmtree(folder)
  most = {'peak MiB': peak >> 20, 'slowest ms': round(1000 * slowest)}
  print(json.dumps({'counts': counts, 'most': most}), flush=True)


class Tried(NamedTuple):
  """What became of one reading.

  Attributes:
    outcome: read, refused, or '' if it did not end.
    problem: what was wrong, in words, or None.
    bytes: of memory that it took at its peak.
    seconds: of processor time.
  """

  outcome: str
  problem: str | None
  bytes: int
  seconds: float


def attempt(read: Callable[[Path], object], folder: Path, watch: Watch) -> Tried:
  """Reads a folder, and measures what that takes against the size of its files."""
  size = sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())
  seconds = _SECONDS + _SECONDS_A_MIB * size / 2**20
  outcome, problem = '', None
  signal.signal(signal.SIGPROF, _too_slow)
  held, started = _start_peak(), time.process_time()
  signal.setitimer(signal.ITIMER_PROF, seconds)
  watch.is_on = True
  try:
    read(folder)
    outcome = 'read'
  except TooSlow:
    problem = f'no end after {seconds:.0f} s'
  except Exception as e:
    outcome = 'refused'
    if not is_ours(e, folder):
      problem = f'{type(e).__name__}: {e!s:.300}'
  finally:
    watch.is_on = False
    signal.setitimer(signal.ITIMER_PROF, 0)
  took = _memory_bytes('VmHWM') - held
  if took > _MORE_BYTES + _TIMES_ITS_FILES * size:
    problem = f'took {took >> 20} MiB for files of {size / 2**20:.1f}'
  return Tried(outcome, problem, took, time.process_time() - started)


def _too_slow(number, frame):
  raise TooSlow


def _limit_memory():
  """A runaway allocation fails here before it hurts the machine."""
  pages = int(Path('/proc/self/statm').read_text().split()[0])
  limit = pages * resource.getpagesize() + (2 << 30)
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _start_peak() -> int:
  """Lets the kernel measure the peak anew; returns the bytes in use."""
  ctypes.CDLL(None).malloc_trim(0)  # what is free would hide what is taken
  Path('/proc/self/clear_refs').write_text('5')
  return _memory_bytes('VmRSS')


def _memory_bytes(name: str) -> int:
  """A line of this process's status: VmRSS is in use, VmHWM its peak."""
  status = Path('/proc/self/status').read_text()
  return int(re.search(rf'{name}:\s*(\d+) kB', status)[1]) * 1024


if __name__ == '__main__':
  main(sys.argv[1], *map(int, sys.argv[2:5]), Path(sys.argv[5]))
