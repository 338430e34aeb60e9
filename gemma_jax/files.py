"""Whole files and folders, on a disk of this machine or in an object store.

    files.path('gs://bucket/run')       an etils.epath path, as for a local one
    files.write(path, content)          a file, there whole or not at all
    files.read_json_lines(path)         its rows; text is UTF-8 everywhere
    files.parse_json(content)           a value in proportion to its text
    files.put_folder(local, path)       a folder, file by file
    files.fetch('gs://bucket/gemma')    a local copy, made once

On a disk, a temporary file is written, flushed and renamed. An object store stores
an object whole; it can neither rename nor append, so neither is attempted there.
"""

from collections.abc import Iterable, Iterator, Mapping
import functools
import hashlib
import json
import math
import os
from pathlib import Path
import sys
from typing import Any

from etils import epath

from gemma_jax import temporary

# Parsed, JSON takes many times its text: an empty list 3 bytes there, 64 here.
_JSON_BYTES = {'{': 256, '[': 96, ',': 40, ':': 128, '"': 32}
_MORE_BYTES = 64 << 20

_STORE = 'gs://'
_CACHE = '~/.cache/gemma_jax/remote'


def is_remote(name: str | os.PathLike) -> bool:
  """Whether a path lies in an object store."""
  return '://' in os.fspath(name)


def path(name: str | os.PathLike) -> epath.Path:
  """A path of either kind, `~` expanded.

  Raises:
    ValueError: an object store other than gs://, or its package is missing.
  """
  if is_remote(name):
    if not os.fspath(name).startswith(_STORE):
      raise ValueError(
        f'path: got {name}, expected {_STORE}BUCKET/... or a path of this '
        'machine; no other object store is read.'
      )
    _connect()
  return epath.Path(name).expanduser()


def absolute(name: str | os.PathLike) -> epath.Path:
  """The same, from the root on; links stay in it, as they were given."""
  given = path(name)
  return given if is_remote(given) else epath.Path(Path(given).absolute())


def write(name: str | os.PathLike, content: str | bytes) -> None:
  """Writes a file whole or not at all; makes its folder if there is none."""
  target = path(name)
  content = content.encode() if isinstance(content, str) else content
  if is_remote(target):
    target.write_bytes(content)
    return
  target.parent.mkdir(parents=True, exist_ok=True)
  with temporary.file(Path(target)) as (new, f):
    f.write(content)
    f.flush()
    os.fsync(f.fileno())
    os.replace(new, target)


def to_json(value: Any, name: str | os.PathLike = 'output', **layout: Any) -> str:
  """JSON text, in which only null stands for missing values: JSON has no NaN or Infinity.

  Args:
    value: of dicts, lists, strings, numbers, booleans and None.
    name: of the file, say, for the message.
    **layout: `indent`, `sort_keys` and `ensure_ascii` of `json.dumps`.

  Raises:
    ValueError: a number is NaN or infinite; names it.
  """
  try:
    return json.dumps(value, allow_nan=False, **layout)
  except ValueError:
    for place, number in _not_finite(value, ''):
      raise ValueError(
        f'{name}: {place or "value"} is {number}, expected a finite number.'
      ) from None
    raise


def _not_finite(value: Any, place: str) -> Iterator[tuple[str, float]]:
  """('evals[3].loss', nan) of each number that is not finite."""
  if isinstance(value, float):
    if not math.isfinite(value):
      yield place, value
  elif isinstance(value, Mapping):
    for key, each in value.items():
      yield from _not_finite(each, f'{place}.{key}' if place else str(key))
  elif isinstance(value, list | tuple):
    for i, each in enumerate(value):
      yield from _not_finite(each, f'{place}[{i}]')


def parsed_bytes(text: str) -> int:
  """What a JSON text takes in memory at most: itself, its values, both in a message."""
  # A character beyond ASCII makes all of them up to 4 times as wide, once more on the way.
  wide = max(sys.getsizeof(text), 4 * len(text) if '\\u' in text else 0)
  return 4 * wide + sum(n * text.count(mark) for mark, n in _JSON_BYTES.items())


def parse_json(content: bytes) -> Any:
  """The value of a JSON text in UTF-8, if it is in proportion to the text.

  What is made of it, a message that shows a string of it included, takes at most
  64 MiB and 4 times the text.

  Raises:
    ValueError: not JSON, nested too deeply, or of too many values.
  """
  most = _MORE_BYTES + 3 * len(content)  # the content is the fourth
  text = content.decode() if content.isascii() or 2 * len(content) < _MORE_BYTES else None
  if text is None or parsed_bytes(text) >= most:
    raise ValueError(f'its values would take more than {most >> 20:,} MiB of memory')
  try:
    return json.loads(text)
  except RecursionError:
    raise ValueError('nested too deeply') from None


def write_json(name: str | os.PathLike, value: Mapping[str, Any]) -> None:
  """Writes a JSON object for people to read; ValueError as `to_json`."""
  write(name, to_json(value, name, indent=2) + '\n')


def write_json_lines(name: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
  """Writes JSON Lines; ValueError as `to_json`."""
  lines = (
    to_json(row, f'{name}, line {number}', ensure_ascii=False) for number, row in enumerate(rows, 1)
  )
  write(name, ''.join(f'{line}\n' for line in lines))


def read_text(name: str | os.PathLike) -> str:
  """The text of a file, UTF-8 whatever the locale says.

  Raises:
    ValueError: it is not UTF-8.
  """
  try:
    return path(name).read_bytes().decode('utf-8')
  except UnicodeDecodeError as e:
    raise ValueError(f'{name}: not UTF-8 text ({e}).') from None


def read_lines(name: str | os.PathLike) -> Iterator[bytes]:
  """The lines of a text file, one after the other, with the \\n that alone ends them.

  `str.splitlines` would also end them at U+2028 and the like, which JSON has
  inside its strings.
  """
  with path(name).open('rb') as f:
    yield from f


def read_json_lines(name: str | os.PathLike) -> list[Any]:
  """The values of a JSON Lines file; empty lines are left out.

  Raises:
    ValueError: a line is not JSON; says which.
  """
  values = []
  for number, line in enumerate(read_lines(name), 1):
    if not line.strip():
      continue
    try:
      values.append(parse_json(line))
    except ValueError as e:
      raise ValueError(f'{name}, line {number}: not JSON ({e}).') from None
  return values


def put_folder(folder: Path, target: str | os.PathLike, newer_than: float = 0.0) -> None:
  """Puts the files of a local folder into an object store, each of them whole.

  They go in reverse order of name: config.json comes after the weights that it
  describes, so what has one is complete.

  Args:
    folder: of this machine.
    target: remote; files that are there under other names stay.
    newer_than: leave out files that were last changed before this time.
  """
  store, root = _open(target)
  for file in sorted(folder.rglob('*'), reverse=True):
    if file.is_file() and file.stat().st_mtime >= newer_than:
      store.put_file(str(file), f'{root}/{file.relative_to(folder)}')


def remove_others(folder: Path, target: str | os.PathLike) -> None:
  """Removes the files of a remote folder that a local one does not have."""
  store, root = _open(target)
  for name in store.find(root):
    if not (folder / os.path.relpath(name, root)).exists():
      store.rm_file(name)


def fetch(name: str | os.PathLike) -> Path:
  """Returns a local copy of a file or folder; a local path is returned unchanged.

  Copies are kept in ~/.cache/gemma_jax/remote by the versions of all their files,
  so that one changed in the store is fetched again. If nothing is there, the path
  returned does not exist.
  """
  if not is_remote(name):
    return Path(name).expanduser()
  store, root = _open(name)
  remote = store.find(root, detail=True)
  digest = hashlib.sha256(os.fspath(name).encode())
  for file, info in sorted(remote.items()):
    version = [info.get(key) for key in ('size', 'etag', 'mtime')]
    digest.update(f'{file} {version}\n'.encode())
  kept = Path(_CACHE).expanduser() / digest.hexdigest()[:32]
  copy = kept / Path(root).name
  if copy.exists() or not remote:
    return copy
  kept.parent.mkdir(parents=True, exist_ok=True)
  with temporary.folder(kept) as part:
    temporary.remove_leftovers(kept, temporary.NEW, part.path)
    for file in remote:
      to = part.path / Path(root).name / os.path.relpath(file, root)
      to.parent.mkdir(parents=True, exist_ok=True)
      store.get_file(file, str(to))
    try:
      part.publish(kept)
    except OSError:
      if not copy.exists():  # else another process was faster
        raise
  return copy


def check_bucket(name: str) -> None:
  """Raises ValueError if the bucket of a remote path cannot be reached."""
  store, root = _open(name)
  bucket = root.split('/')[0]
  try:
    is_there = store.exists(bucket)
  except Exception as e:
    raise ValueError(f'path: got {name}, which cannot be reached ({e}).') from None
  if not is_there:
    raise ValueError(
      f'path: got {name}, but there is no bucket {bucket}, or no permission to '
      'see it; make it, or log in (gcloud auth application-default login).'
    )


def _open(name: str | os.PathLike) -> tuple[Any, str]:
  """(fsspec file system, path in it) of a remote path."""
  path(name)
  from fsspec.core import url_to_fs

  return url_to_fs(os.fspath(name))


@functools.cache
def _connect() -> None:
  """Makes gs:// work, and see what other hosts have just written."""
  try:
    import gcsfs  # noqa: F401
  except ImportError:
    raise ValueError("path: gs:// needs the extra gcs; pip install -e '.[gcs]'.") from None
  from fsspec.config import conf

  conf.setdefault('gcs', {})['use_listings_cache'] = False
