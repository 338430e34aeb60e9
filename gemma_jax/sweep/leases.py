"""Which machine works on which job, agreed through a shared folder alone.

A job's leases are files NAME.0, NAME.1, ...; the last one is in force. Creating
a file that must not exist yet is atomic, so of several machines that want a job,
or that see its lease expired, exactly one creates the next file. The holder
touches its file; a lease that has not been touched for a while, or whose process
on this same machine has died, has expired. All times are the folder's own:
machines' clocks need not agree.

A machine that sleeps for longer than a lease lasts may wake up while another
one does its job, so it checks `is_held` before it writes a result.
"""

import contextlib
import json
import os
from pathlib import Path
import socket
import tempfile
import threading

from gemma_jax import files

EXPIRY_SECS = 120.0


class Lease:
  """A lease that this process holds, touched by a thread until `release`."""

  def __init__(self, path: Path, expiry_secs: float):
    self.path = path
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._touch, args=(expiry_secs / 4,), daemon=True)
    self._thread.start()

  def is_held(self) -> bool:
    """Whether no other process has taken it over."""
    name, number = _parts(self.path)
    return not _path(self.path.parent, name, number + 1).exists()

  def release(self) -> None:
    """Lets another process take the job at once."""
    self._done.set()
    self._thread.join()
    # If the folder cannot be reached, the lease expires by itself.
    with contextlib.suppress(OSError):
      if self.is_held():
        # Backdated rather than removed: a number is never used twice.
        os.utime(self.path, (0, 0))

  def _touch(self, every_secs: float):
    while not self._done.wait(every_secs):
      # The folder may be out of reach for a moment: try again.
      with contextlib.suppress(OSError):
        os.utime(self.path)


def take(folder: str | os.PathLike, name: str, expiry_secs: float = EXPIRY_SECS) -> Lease | None:
  """Takes a job, or returns None if another process holds it.

  Args:
    folder: of the leases, shared by all machines; created if missing.
    name: of the job.
    expiry_secs: how long an untouched lease stays in force.
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  numbers = [int(p.suffix[1:]) for p in folder.glob(f'{name}.*') if _is_lease(p, name)]
  last = max(numbers, default=-1)
  if last >= 0 and not _expired(_path(folder, name, last), expiry_secs):
    return None
  path = _path(folder, name, last + 1)
  try:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
  except FileExistsError:
    return None
  with os.fdopen(descriptor, 'w', encoding='utf-8') as f:
    f.write(files.to_json(_me(), path))
  return Lease(path, expiry_secs)


def _expired(path: Path, expiry_secs: float) -> bool:
  touched = path.stat().st_mtime
  if touched == 0:  # released
    return True
  try:
    holder = json.loads(files.read_text(path))
  except ValueError:  # just created, or its creator died before writing
    holder = {}
  if holder.get('host') == socket.gethostname() and holder.get('started') != _started(
    holder['pid']
  ):
    return True
  return _now(path.parent) - touched > expiry_secs


def _now(folder: Path) -> float:
  """Returns the time by the clock that stamps the folder's files."""
  # Unnamed where the system allows it, so that a process killed here leaves
  # nothing behind.
  with tempfile.TemporaryFile(dir=folder) as probe:
    return os.fstat(probe.fileno()).st_mtime


def _me() -> dict[str, object]:
  pid = os.getpid()
  return {'host': socket.gethostname(), 'pid': pid, 'started': _started(pid)}


def _started(pid: int) -> str | None:
  """Returns when a process of this machine started, or None if there is none.

  Process ids are reused; together with its start time an id denotes one process.
  Where the system does not tell, a live id counts as the process.
  """
  try:
    # The process name in it, in parentheses, may be any bytes.
    stat = Path(f'/proc/{pid}/stat').read_bytes()
    fields = stat.rpartition(b')')[2].decode().split()
    return None if fields[0] == 'Z' else fields[19]
  except OSError:
    pass
  if os.path.isdir('/proc/self'):
    return None
  try:
    os.kill(pid, 0)
    return 'alive'
  except ProcessLookupError:
    return None
  except PermissionError:
    return 'alive'


def _path(folder: Path, name: str, number: int) -> Path:
  return folder / f'{name}.{number}'


def _parts(path: Path) -> tuple[str, int]:
  name, _, number = path.name.rpartition('.')
  return name, int(number)


def _is_lease(path: Path, name: str) -> bool:
  head, _, number = path.name.rpartition('.')
  return head == name and number.isdecimal()
