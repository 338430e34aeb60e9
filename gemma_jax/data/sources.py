"""Where records come from, and which of them are held out.

path/to/file.jsonl[.gz|.xz]   one file; a part is held out by hash
sample:seoul_travel           the embedded sample with its held-out file
tfds:dolly[:local file]       a builder of `data/tfds`; its validation split
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import functools
import importlib.resources
import itertools
import math
from typing import Any

from gemma_jax.config.train import DataConfig
from gemma_jax.data import records as records_lib
from gemma_jax.data.record import Record
from gemma_jax.data.records import Reading

HELDOUT_FRACTION = 0.05


@dataclasses.dataclass(frozen=True)
class Records:
  """What a run learns from and what it is measured on.

  Attributes:
    train: records, in the order of their source.
    heldout: records that share no prompt with `train`, unless the caller named
      an `eval_path` that does.
    skipped: unusable rows of both by reason, if they may be skipped.
  """

  train: list[Record]
  heldout: list[Record]
  skipped: collections.Counter[str]

  def lines(self) -> list[str]:
    """Which records were skipped and which fields were not read, for people."""
    return Reading([*self.train, *self.heldout], self.skipped).lines()


def load_records(config: DataConfig, tfds_dir: str = '') -> Records:
  """Reads the training and the held-out records that a config names.

  Reading ends where there are as many of both as the config asks for.

  Args:
    config: `path`, `eval_path`, `template`, `with_context`, `max_records`,
      `max_eval_records` and `skip_bad_records` decide.
    tfds_dir: where prepared TFDS data sets are kept; '' is
      ~/.cache/gemma_jax/tfds.

  Raises:
    ValueError: a missing source or a bad record, with its place.
  """
  path = config.path
  rows = functools.partial(_rows, path, 'data.path', 'train', tfds_dir)
  train = _Source(rows, 'data.path', path, config)
  heldout = None
  if config.eval_path or _own_heldout(path):
    name = 'data.eval_path' if config.eval_path else 'data.path'
    path = config.eval_path or path
    heldout = _Source(functools.partial(_rows, path, name, 'heldout', tfds_dir), name, path, config)
  return _limited(train, heldout, config)


def _limited(train: '_Source', heldout: '_Source | None', config: DataConfig) -> Records:
  """As many records of each part as the config asks for; without `heldout`, of a split."""
  if heldout is None:
    parts = split(train, config.max_records, config.max_eval_records, train.source)
    return Records(*parts, train.skipped)
  return Records(
    list(itertools.islice(train, config.max_records or None)),
    list(itertools.islice(heldout, config.max_eval_records or None)),
    train.skipped + heldout.skipped,
  )


def of_rows(rows: Sequence[Any], heldout: Sequence[Any] | None, config: DataConfig) -> Records:
  """Does the same for rows in memory.

  Args:
    rows: dicts, as the lines of a file would be.
    heldout: rows to measure on; None holds out a part of `rows`.
    config: as in `load_records`; its paths do not matter.

  Raises:
    ValueError: a bad record, with its place.
  """

  def source(rows: Sequence[Any], name: str) -> _Source:
    return _Source(functools.partial(_placed, rows, name), name, 'memory', config)

  return _limited(
    source(rows, 'records'), None if heldout is None else source(heldout, 'heldout'), config
  )


def load_heldout(
  path: str,
  template: str,
  name: str = 'data.eval_path',
  tfds_dir: str = '',
  skip_bad_records: bool = False,
  most: int = 0,
) -> Reading:
  """Reads what a source offers for evaluation, in its order.

  Args:
    path: a file (all of its records), `sample:NAME` (its held-out file) or
      `tfds:NAME` (its validation split).
    template: text records are checked against it.
    name: the setting that holds the path, for error messages.
    tfds_dir: as in `load_records`.
    skip_bad_records: count unusable rows instead of stopping at the first.
    most: stops after so many records; 0 reads all.

  Raises:
    ValueError: a missing source or a bad record, with its place.
  """
  rows = _rows(path, name, 'heldout', tfds_dir)
  return records_lib.usable(rows, template, name, path, skip_bad_records, most)


def split(
  records: Iterable[Record],
  most_train: int = 0,
  most_heldout: int = 0,
  source: str = 'records',
) -> tuple[list[Record], list[Record]]:
  """Holds out the records whose prompt hashes below `HELDOUT_FRACTION`.

  Whether a record is held out depends on its own prompt alone, not on the
  machine, the order or the other records, so that a prompt is never on both sides
  and a growing file keeps its held-out records. (The same question as a prompt and
  as messages is two prompts; the audit reports it.) If this would leave a side
  empty, the prompt with the least or greatest hash moves over.

  Args:
    records: at least two different prompts; iterated once, and once more if a
      prompt has to move over.
    most_train: so many of these are kept, the first ones; 0 keeps all.
    most_heldout: the same of these. Iteration ends when there are enough of both.
    source: name in the error message.

  Returns:
    (train, held-out), each in the order given.

  Raises:
    ValueError: all records have the same prompt.
  """
  below = HELDOUT_FRACTION
  while True:
    train, heldout = [], []
    least, greatest = 1.0, 0.0
    for record in records:
      place = _place(record)
      least, greatest = min(least, place), max(greatest, place)
      side, most = (heldout, most_heldout) if place < below else (train, most_train)
      if not most or len(side) < most:
        side.append(record)
      if len(train) == most_train > 0 and len(heldout) == most_heldout > 0:
        break
    if train and heldout:
      return train, heldout
    if least >= greatest:
      raise ValueError(
        f'data.path: {source} holds {int(least == greatest)} different prompt(s), '
        'expected at least 2 to hold one out. Set data.eval_path=PATH.'
      )
    below = greatest if least < below else math.nextafter(least, 1)


def heldout_part(record: Record) -> str:
  """'validation' or 'test', by bits of the hash that `split` does not read.

  Half of the prompts each; choose on the former, report on the latter.
  """
  return 'test' if record.key[6] < 128 else 'validation'


def _place(record: Record) -> float:
  """A hash of what precedes the last response, uniform in [0, 1)."""
  return int.from_bytes(record.key[:6], 'big') / 2**48


def _own_heldout(path: str) -> bool:
  return path.startswith(('sample:', 'tfds:'))


def _placed(rows: Sequence[Any], name: str) -> Iterator[tuple[str, Any]]:
  return ((f'{name}[{i}]', row) for i, row in enumerate(rows))


@dataclasses.dataclass(frozen=True)
class _Source:
  """The records of a source that a config asks for, read anew by each iteration.

  Attributes:
    rows: begins to read its (place, row).
    name: the setting that names it.
    source: what it is called there.
    config: as in `load_records`.
    skipped: rows that the last iteration could not use, by reason.
  """

  rows: Callable[[], Iterator[tuple[str, Any]]]
  name: str
  source: str
  config: DataConfig
  skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

  def __iter__(self) -> Iterator[Record]:
    self.skipped.clear()
    config, is_empty = self.config, True
    for record in records_lib.each_usable(
      self.rows(),
      config.template,
      self.name,
      self.source,
      config.skip_bad_records,
      self.skipped,
    ):
      if config.with_context or not record.context:
        is_empty = False
        yield record
    if is_empty:
      raise ValueError(
        f'{self.name}: every record of {self.source} has a context, but '
        'data.with_context is False; nothing is left.'
      )


def _rows(path: str, name: str, part: str, tfds_dir: str) -> Iterator[tuple[str, Any]]:
  kind, _, rest = path.partition(':')
  if kind == 'sample':
    suffix = '_heldout' if part == 'heldout' else ''
    folder = importlib.resources.files('gemma_jax.data') / 'samples'
    file = folder / f'{rest}{suffix}.jsonl'
    if not file.is_file():
      there = sorted(f.name.removesuffix('.jsonl') for f in folder.iterdir())
      raise ValueError(
        f'{name}: got {path!r}, expected one of '
        f'{", ".join(f"sample:{s}" for s in there if "heldout" not in s)}.'
      )
    with importlib.resources.as_file(file) as local:
      yield from records_lib.read_jsonl(str(local), name)
  elif kind == 'tfds':
    from gemma_jax.data import tfds as tfds_lib

    dataset, _, local = rest.partition(':')
    split_name = 'validation' if part == 'heldout' else 'train'
    for i, record in enumerate(tfds_lib.read_split(dataset, split_name, local, tfds_dir)):
      yield f'{path} {split_name} record {i}', record
  else:
    yield from records_lib.read_jsonl(path, name)
