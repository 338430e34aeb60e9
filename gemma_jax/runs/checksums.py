"""Checksums over a checkpoint's files: what was written is what is read.

Orbax restores a flipped bit without a word. So each step's folder carries a
`checksums.json` of its other files:

    {"state/manifest.ocdbt": [234, "9f86d081884c..."], ...}    # bytes, SHA-256

It is written before the folder gets its final name, so it is part of the
commit: there is no moment at which a step exists but cannot be checked.
"""

from collections.abc import Iterable
import hashlib
from typing import Any

from etils import epath

from gemma_jax import files, temporary

CHECKSUMS = 'checksums.json'
_CHUNK_BYTES = 1 << 20


def seal(folder: epath.Path, skip: Iterable[str] = ()) -> None:
  """Adds the checksums of files that have none yet.

  Args:
    folder: a step's.
    skip: files, relative to it, that are still going to change.
  """
  sums = _read(folder) if (folder / CHECKSUMS).exists() else {}
  missing = _files(folder) - sums.keys() - set(skip)
  if missing:
    sums |= {name: _checksum(folder / name) for name in sorted(missing)}
    files.write_json(folder / CHECKSUMS, sums)


def is_sealed(folder: epath.Path) -> bool:
  """Whether there are checksums to check."""
  return (folder / CHECKSUMS).exists()


def defects(folder: epath.Path) -> list[str]:
  """What is wrong with a step's files, each in a few words; [] if nothing.

  Files are read in pieces, so memory does not grow with them. A file that is not
  listed is not a defect: nothing is read from it.
  """
  if not is_sealed(folder):
    return [f'{CHECKSUMS} is missing']
  try:
    sums = _read(folder)
  except ValueError:
    return [f'{CHECKSUMS} is damaged']
  wrong = []
  present = _files(folder)
  for name, (size, digest) in sums.items():
    if name not in present:
      wrong.append(f'{name} is missing')
      continue
    got_size, got_digest = _checksum(folder / name)
    if got_size != size:
      wrong.append(f'{name} has {got_size} bytes of {size}')
    elif got_digest != digest:
      wrong.append(f'{name} has other content')
  return wrong


def newest_good(root: epath.Path) -> tuple[int | None, dict[int, str]]:
  """The newest step to continue from, and what is wrong with the ones after it.

  A step without checksums (made by an older version, or its `checksums.json`
  was lost) is not trusted where an older step can be checked, since a run
  repeats the updates in between bit for bit; it is used where there is no
  other.

  Args:
    root: folder of the steps, each named by its number; may be absent.

  Returns:
    (step or None, {newer step: its defects}); a step that is used unchecked is
    in both.
  """
  bad: dict[int, str] = {}
  unchecked = None
  for step in reversed(steps(root)):
    wrong = defects(root / str(step))
    if not wrong:
      return step, bad
    bad[step] = '; '.join(wrong[:3])
    if not is_sealed(root / str(step)) and unchecked is None:
      unchecked = step
  return unchecked, bad


def set_aside(root: epath.Path, step: int) -> epath.Path:
  """Renames a step, so that it is neither used nor deleted; returns the new path."""
  number, target = 1, root / f'{step}.set_aside'
  while target.exists():
    number += 1
    target = root / f'{step}.set_aside{number}'
  (root / str(step)).rename(target)
  return target


def steps(root: epath.Path) -> list[int]:
  """Numbers of the steps in a folder, which may be absent, in order."""
  if not root.exists():
    return []
  return sorted(int(p.name) for p in root.iterdir() if p.name.isdecimal())


def _files(folder: epath.Path) -> set[str]:
  """All files below a folder, relative to it, except `checksums.json`."""
  names, folders = set(), [(folder, '')]
  while folders:
    path, prefix = folders.pop()
    for child in path.iterdir():
      if child.is_dir():
        folders.append((child, f'{prefix}{child.name}/'))
      else:
        names.add(f'{prefix}{child.name}')
  return {
    name
    for name in names - {CHECKSUMS}
    if not temporary.is_temporary(name, CHECKSUMS, temporary.FILE)
  }


def _checksum(path: epath.Path) -> tuple[int, str]:
  """(bytes, SHA-256) of a file."""
  digest, size = hashlib.sha256(), 0
  with path.open('rb') as f:
    while chunk := f.read(_CHUNK_BYTES):
      digest.update(chunk)
      size += len(chunk)
  return size, digest.hexdigest()


def _read(folder: epath.Path) -> dict[str, Any]:
  """{name: [bytes, SHA-256]}; ValueError if it has another form."""
  sums = files.parse_json((folder / CHECKSUMS).read_bytes())
  is_table = isinstance(sums, dict) and all(
    isinstance(row, list) and len(row) == 2 and isinstance(row[0], int) and isinstance(row[1], str)
    for row in sums.values()
  )
  if not is_table:
    raise ValueError(f'{folder}/{CHECKSUMS}: not a table of checksums.')
  return sums
