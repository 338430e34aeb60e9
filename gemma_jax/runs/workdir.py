"""What a run leaves in its workdir, and who may write there.

run.json          config and fingerprints, a copy to read
checkpoints/      Orbax, the newest two steps, with the same facts (`resume`)
adapter/          the last adapter, PEFT layout, when the run has finished
adapter_best/     the adapter with the lowest held-out loss so far
heldout/          step_N.jsonl: index, nll, tokens of every held-out record
log.txt           the log of the command, over all resumes; on a disk
metrics.jsonl     a line per update and per evaluation; lines that are neither are moved
                  to metrics.jsonl.set_aside when the run resumes
tensorboard/      the same
result.json       the result line and the same facts, when the run has finished;
                  paths in it are relative to the workdir
"""

from collections.abc import Callable, Iterator
import contextlib
import errno
import fcntl
import os
from typing import Any

from etils import epath
import jax

from gemma_jax import files
from gemma_jax.runs import checksums, hosts

# What can go wrong with a disk, in the system's terms.
_DISK_ERRORS = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
  errno.ENOENT,
  errno.ENOTDIR,
  errno.EIO,
  errno.ESTALE,
)


def read_json(
  workdir: str, name: str, remedy: str = 'Put it back as it was, or use another workdir.'
) -> dict[str, Any] | None:
  """A JSON object in a file of the workdir, or None if it is not there.

  Raises:
    ValueError: the file was cut or edited; ends with the remedy.
  """
  path = files.path(workdir) / name
  if not path.exists():
    return None
  try:
    value = files.parse_json(path.read_bytes())
  except ValueError as e:
    raise ValueError(f'{path}: cut or damaged ({e}). {remedy}') from None
  if not isinstance(value, dict):
    raise ValueError(f'{path}: got {type(value).__name__}, expected an object. {remedy}')
  return value


def has_result(workdir: str) -> bool:
  """Whether a run, this one or another, has finished here."""
  return (files.path(workdir) / 'result.json').exists()


def remove_result(workdir: str) -> None:
  """Turns a finished run into one that continues."""
  (files.path(workdir) / 'result.json').unlink(missing_ok=True)


def write_json(workdir: str, name: str, value: dict[str, Any]) -> None:
  """Writes a JSON file whole or not at all."""
  files.write_json(files.path(workdir) / name, value)


def write_heldout(workdir: str, step: int, index, nll, tokens) -> None:
  """Writes the losses of an evaluation by record; index, nll and tokens are [N]."""
  rows = [
    {'index': int(i), 'nll': float(n), 'tokens': int(t)}
    for i, n, t in zip(index, nll, tokens, strict=True)
  ]
  files.write_json_lines(_heldout(workdir, step), rows)


def read_heldout(workdir: str, step: int) -> list[dict[str, Any]]:
  """Reads what `write_heldout` wrote."""
  return files.read_json_lines(_heldout(workdir, step))


def check_writable(workdir: str) -> None:
  """ValueError if the workdir cannot be made or written; writes nothing."""
  if files.is_remote(workdir):
    files.check_bucket(workdir)
    return
  path = files.absolute(workdir)
  while not path.exists():
    path = path.parent
  if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
    raise ValueError(f'workdir: got {workdir}, but {path} is not a writable folder; expected one.')


# Where Linux lists a process's open files, as links.
_DESCRIPTORS = '/proc/self/fd/'


class Moved(OSError):
  """The workdir was renamed while a run was training in it."""


class Place:
  """A workdir that a run has to itself.

  Its path may come to name another folder, with a run of its own.

  Attributes:
    workdir: its path, for messages.
    root: its path for writers, which still leads to the folder after a rename
      where the system has such paths (Linux); else the same.
  """

  def __init__(self, workdir: str, descriptor: int | None = None):
    """Takes a folder.

    Args:
      workdir: its path.
      descriptor: the open, locked folder; None: nothing is checked.
    """
    self.workdir = self.root = workdir
    self._descriptor = descriptor
    link = f'{_DESCRIPTORS}{descriptor}'
    # Several processes have to agree on the path.
    if os.path.isdir(link) and jax.process_count() == 1:
      self.root = link

  def check(self) -> None:
    """OSError if the path no longer leads to the folder."""
    if self._descriptor is None:
      return
    mine = os.fstat(self._descriptor)
    try:
      if os.path.samestat(mine, os.stat(self.workdir)):
        return
      now = 'another folder is there now'
    except OSError as e:
      if mine.st_nlink == 0:  # it was removed
        raise
      now = e.strerror
    raise Moved(
      f'workdir {self.workdir}: was renamed while a run was training in it '
      f'({now}); nothing more was written. Run the same command again with '
      'its new path as --workdir.'
    )


@contextlib.contextmanager
def only_run(workdir: str) -> Iterator[Place]:
  """Keeps a second run out of the workdir, which is made if need be.

  The lock is the kernel's, on the folder itself: it leaves nothing behind and
  ends with the process, however that ends. Object stores and some network disks
  have no locks; there nothing is kept out.

  Yields:
    The place, to be checked before anything is written.

  Raises:
    ValueError: another process trains in this workdir.
  """
  if files.is_remote(workdir) or not hosts.is_lead():
    yield Place(workdir)
    return
  os.makedirs(workdir, exist_ok=True)
  folder = os.open(workdir, os.O_RDONLY)
  try:
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(folder)
    raise ValueError(
      f'workdir {workdir}: another process is training in it; wait until it '
      'ends, or use another workdir.'
    ) from None
  except OSError:
    pass
  place = Place(workdir, folder)
  try:
    yield place
  except Exception:
    # What a writer raised may hide that the folder was renamed.
    place.check()
    raise
  finally:
    os.close(folder)


class DiskError(OSError):
  """What befell a workdir's disk, in one line."""


@contextlib.contextmanager
def naming_disk_errors(workdir: str, kept: Callable[[], str] | None = None) -> Iterator[None]:
  """Says what befell the workdir's disk, what is safe, and what to do.

  Writers below us raise errors of their own kinds, with the words of the
  system somewhere in a long text.

  Args:
    workdir: of a run, or of a sweep.
    kept: what is safe there; None is a run's newest good step, and the workdir
      was there when the run began.

  Raises:
    DiskError: instead of an error of the disk; others pass.
  """
  try:
    yield
  except (Moved, DiskError):
    raise
  except Exception as e:
    is_gone = kept is None and not files.path(workdir).exists()
    words = os.strerror(errno.ENOENT) if is_gone else _system_words(workdir, e)
    if words is None:
      raise
    raise DiskError(
      f'workdir {workdir}: {words}. It keeps {kept() if kept else _safe_step(workdir)} '
      'and no half-written adapter; fix that and run the same command again.'
    ) from e


def _safe_step(workdir: str) -> str:
  step, _ = checksums.newest_good(files.path(workdir) / 'checkpoints')
  return 'no checkpoint' if step is None else f'the checkpoint of step {step}'


def _system_words(workdir: str, e: Exception) -> str | None:
  """'No space left on device', or whatever else went wrong with the disk."""
  for number in _DISK_ERRORS:
    words = os.strerror(number)
    is_named = workdir in str(e) or _DESCRIPTORS in str(e) or number in (errno.ENOSPC, errno.EDQUOT)
    if is_named and (getattr(e, 'errno', None) == number or words in str(e)):
      return words
  return None


def _heldout(workdir: str, step: int) -> epath.Path:
  return files.path(workdir) / 'heldout' / f'step_{step}.jsonl'
