"""Reads mutated inputs in a process of its own, and watches what happens.

  python -m tests.faults.worker FORMAT SEED FIRST LAST FOLDER

A line of JSON for each trial that went wrong, and one with the counts at the
end. FOLDER/progress holds the trial that is under way, for the caller that
finds this process dead.
"""

import collections
import json
import os
from pathlib import Path
import re
import resource
import shutil
import signal
import sys

import numpy as np

from tests.faults import corpora, mutate

MORE_MEMORY_BYTES = 256 << 20
_SECONDS = 60
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
  peak = _peak_bytes()
  signal.signal(signal.SIGALRM, _too_slow)
  for trial in range(first, last):
    (root / 'progress').write_text(str(trial))
    undo = damage(kind, seed, trial, folder, valid)
    problem = None
    watch.events.clear()
    signal.alarm(_SECONDS)
    watch.is_on = True
    try:
      read(folder)
      counts['read'] += 1
    except TooSlow:
      problem = f'no end after {_SECONDS} s'
    except Exception as e:
      counts['refused'] += 1
      if not is_ours(e, folder):
        problem = f'{type(e).__name__}: {e!s:.300}'
    finally:
      watch.is_on = False
      signal.alarm(0)
    undo()
    if watch.events:
      problem = f'did {watch.events[:3]}'
    if {p.name for p in root.iterdir()} != before:
      problem = f'left {sorted(p.name for p in root.iterdir())}'
    if _peak_bytes() > peak + MORE_MEMORY_BYTES:
      problem = f'took {(_peak_bytes() - peak) >> 20} MiB more'
      peak = _peak_bytes()
    if problem:
      counts['wrong'] += 1
      print(json.dumps({'trial': trial, 'problem': problem}), flush=True)
  shutil.rmtree(folder)
  print(json.dumps({'counts': counts}), flush=True)


def _too_slow(number, frame):
  raise TooSlow


def _limit_memory():
  """A runaway allocation fails here before it hurts the machine."""
  pages = int(Path('/proc/self/statm').read_text().split()[0])
  limit = pages * resource.getpagesize() + (2 << 30)
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _peak_bytes() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == '__main__':
  main(sys.argv[1], *map(int, sys.argv[2:5]), Path(sys.argv[5]))
