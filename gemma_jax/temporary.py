"""Temporary files and folders next to what they become, safe in shared folders.

    .NAME.TOKEN.tmp    a file that is being written
    .NAME.TOKEN.new    a folder that is being filled
    .NAME.TOKEN.old    the folder that it replaces, for a moment

TOKEN is random and each is created exclusively, so nobody can put a link where a
writer is going to write: what others planted is neither followed nor removed. It
ends with a checksum of itself and NAME, so that a user's file with a similar name
is told from ours. (A mark inside would be written after creation, and removed
before the last rename: a process killed in between would leave none.) A writer
holds a kernel lock, which ends with its process, however that ends. So what a
killed one left is recognized by its name, its owner and its lock.
"""

from collections.abc import Iterator
import contextlib
import fcntl
import hashlib
import os
from pathlib import Path
import re
import secrets
import shutil
import stat
import time
from typing import BinaryIO, NamedTuple

FILE, NEW, OLD = 'tmp', 'new', 'old'

# What has not changed for this long has no writer, if locks cannot tell.
_STALE_SECS = 24 * 3600


class Folder(NamedTuple):
  """A folder that is being filled.

  Attributes:
    path: of the folder.
    descriptor: open, and locked if there are locks.
    mode: permissions that it will have; until `publish` it is the owner's only.
  """

  path: Path
  descriptor: int
  mode: int

  def publish(self, target: Path) -> None:
    """Renames it."""
    _chmod(self.descriptor, self.mode)
    os.rename(self.path, target)


def name(target: Path, kind: str) -> Path:
  """A name next to the target that nobody can guess."""
  drawn = secrets.token_hex(8)
  return target.with_name(f'.{target.name}.{drawn}{_checksum(target.name, drawn)}.{kind}')


def is_temporary(candidate: str, target: str, kind: str) -> bool:
  """Whether a file's name is a temporary one of a target's name.

  Any other name, even one with other digits instead of a token, may be anybody's.
  """
  pattern = rf'\.{re.escape(target)}\.([0-9a-f]{{16}})([0-9a-f]{{8}})\.{kind}'
  match = re.fullmatch(pattern, candidate)
  return match is not None and match[2] == _checksum(target, match[1])


def _checksum(target: str, drawn: str) -> str:
  """The last 8 digits of a token."""
  return hashlib.sha256(os.fsencode(f'gemma_jax {target} {drawn}')).hexdigest()[:8]


@contextlib.contextmanager
def file(target: Path) -> Iterator[tuple[Path, BinaryIO]]:
  """A new, locked file next to the target; removed at the end if still there.

  Args:
    target: its folder exists.

  Yields:
    (path, open file); the caller renames it.
  """
  remove_leftovers(target, FILE)
  while True:
    path = name(target, FILE)
    # The umask applies, as to any file.
    flags = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY
    try:
      descriptor = os.open(path, flags, 0o666)
    except FileExistsError:
      continue
    if _is_ours(descriptor, path):
      break
    os.close(descriptor)
  with os.fdopen(descriptor, 'wb') as f:
    try:
      yield path, f
    finally:
      path.unlink(missing_ok=True)


@contextlib.contextmanager
def folder(target: Path) -> Iterator[Folder]:
  """A new, empty, locked folder next to the target; removed if still there.

  Args:
    target: its parent exists.
  """
  while True:
    path = name(target, NEW)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    try:
      os.mkdir(path)
    except FileExistsError:
      continue
    try:
      descriptor = os.open(path, flags)
    except FileNotFoundError:  # another process took it for a leftover
      continue
    if _is_ours(descriptor, path):
      break
    os.close(descriptor)
  try:
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    # Closed to a group that the umask lets write, until it is full.
    _chmod(descriptor, stat.S_IRWXU)
    if os.listdir(descriptor):
      raise PermissionError(f'{path}: somebody else writes into it.')
    yield Folder(path, descriptor, mode)
  finally:
    os.close(descriptor)
    remove(path)


def siblings(target: Path, kind: str) -> list[Path]:
  """Temporary files or folders of a target that this user made, no links.

  The one changed last comes last.
  """
  is_kind = stat.S_ISREG if kind == FILE else stat.S_ISDIR
  ours = []
  with os.scandir(target.parent) as entries:
    for entry in entries:
      if not is_temporary(entry.name, target.name, kind):
        continue
      with contextlib.suppress(FileNotFoundError):  # renamed a moment ago
        status = entry.stat(follow_symlinks=False)
        if status.st_uid == os.geteuid() and is_kind(status.st_mode):
          ours.append((status.st_ctime_ns, Path(entry.path)))
  return [path for _, path in sorted(ours)]


def remove_leftovers(target: Path, kind: str, mine: Path | None = None) -> bool:
  """Removes what killed writers of the target left.

  Args:
    target: what they wrote.
    kind: FILE or NEW.
    mine: one that stays.

  Returns:
    Whether another writer is at work.
  """
  is_busy = False
  for path in siblings(target, kind):
    if path == mine:
      continue
    try:
      flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
      descriptor = os.open(path, flags)
    except OSError:  # renamed a moment ago
      continue
    try:
      is_locked = _lock(descriptor)
      is_busy |= is_locked is False
      age_secs = time.time() - os.fstat(descriptor).st_mtime
      if is_locked or (is_locked is None and age_secs > _STALE_SECS):
        remove(path)
    finally:
      os.close(descriptor)
  return is_busy


def remove(path: Path) -> None:
  """Removes a file, a folder or a link itself, if it exists."""
  with contextlib.suppress(FileNotFoundError):
    if stat.S_ISDIR(os.lstat(path).st_mode):
      shutil.rmtree(path, ignore_errors=True)  # does not follow links
    else:
      os.unlink(path)


def _chmod(descriptor: int, mode: int) -> None:
  """Sets permissions if the file system has them."""
  with contextlib.suppress(OSError):
    os.fchmod(descriptor, mode)


def _is_ours(descriptor: int, path: Path) -> bool:
  """Whether what was just created is locked, and still there.

  A process that removes leftovers may come between creation and lock.
  """
  if _lock(descriptor) is False:
    return False
  try:
    return os.path.samestat(os.fstat(descriptor), os.lstat(path))
  except FileNotFoundError:
    return False


def _lock(descriptor: int) -> bool | None:
  """True if locked now; False if another process holds it; None without locks here."""
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:
    return None
  return True
