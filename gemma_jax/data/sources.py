"""Where records come from, and which of them are held out.

path/to/file.jsonl[.gz|.xz]   one file; a part is held out by hash
sample:seoul_travel           the embedded sample with its held-out file
tfds:dolly[:local file]       a builder of `data/tfds`; its validation split
"""

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import importlib.resources
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

  Args:
    config: `path`, `eval_path`, `template`, `with_context`, `max_records`,
      `max_eval_records` and `skip_bad_records` decide.
    tfds_dir: where prepared TFDS data sets are kept; '' is
      ~/.cache/gemma_jax/tfds.

  Raises:
    ValueError: a missing source or a bad record, with its place.
  """
  train, skipped = _load(config.path, 'data.path', 'train', config, tfds_dir)
  if config.eval_path or _own_heldout(config.path):
    name = 'data.eval_path' if config.eval_path else 'data.path'
    path = config.eval_path or config.path
    heldout, more = _load(path, name, 'heldout', config, tfds_dir)
    skipped += more
  else:
    train, heldout = split(train, source=config.path)
  return _limited(train, heldout, skipped, config)


def _limited(
  train: list[Record],
  heldout: list[Record],
  skipped: collections.Counter[str],
  config: DataConfig,
) -> Records:
  """Keeps as many records of each part as the config asks for."""
  return Records(
    train[: config.max_records or None], heldout[: config.max_eval_records or None], skipped
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
  train, skipped = _usable(_placed(rows, 'records'), 'records', 'memory', config)
  if heldout is None:
    train, kept = split(train)
  else:
    kept, more = _usable(_placed(heldout, 'heldout'), 'heldout', 'memory', config)
    skipped += more
  return _limited(train, kept, skipped, config)


def load_heldout(
  path: str,
  template: str,
  name: str = 'data.eval_path',
  tfds_dir: str = '',
  skip_bad_records: bool = False,
) -> Reading:
  """Reads what a source offers for evaluation, in its order.

  Args:
    path: a file (all of its records), `sample:NAME` (its held-out file) or
      `tfds:NAME` (its validation split).
    template: text records are checked against it.
    name: the setting that holds the path, for error messages.
    tfds_dir: as in `load_records`.
    skip_bad_records: count unusable rows instead of stopping at the first.

  Raises:
    ValueError: a missing source or a bad record, with its place.
  """
  config = DataConfig(template=template, skip_bad_records=skip_bad_records)
  return _load(path, name, 'heldout', config, tfds_dir)


def split(
  records: list[Record], fraction: float = HELDOUT_FRACTION, source: str = 'records'
) -> tuple[list[Record], list[Record]]:
  """Holds out the records whose prompt hashes below `fraction`.

  Whether a record is held out depends on its own prompt alone, not on the
  machine, the order or the other records, so that a prompt is never on both sides
  and a growing file keeps its held-out records. (The same question as a prompt and
  as messages is two prompts; the audit reports it.) If this would leave a side
  empty, the prompt with the least or greatest hash moves over.

  Args:
    records: at least two different prompts.
    fraction: expected share of the prompts.
    source: name in the error message.

  Returns:
    (train, held-out), each in the order given.

  Raises:
    ValueError: all records have the same prompt.
  """
  places = [_place(record) for record in records]
  different = sorted(set(places))
  if len(different) < 2:
    raise ValueError(
      f'data.path: {source} holds {len(different)} different prompt(s), '
      'expected at least 2 to hold one out. Set data.eval_path=PATH.'
    )
  count = sum(place < fraction for place in different)
  chosen = set(different[: min(max(count, 1), len(different) - 1)])
  pairs = list(zip(records, places, strict=True))
  train = [record for record, place in pairs if place not in chosen]
  heldout = [record for record, place in pairs if place in chosen]
  return train, heldout


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


def _load(
  path: str,
  name: str,
  part: str,
  config: DataConfig,
  tfds_dir: str,
) -> Reading:
  """The usable records of one part ('train' or 'heldout') of a source."""
  return _usable(_rows(path, name, part, tfds_dir), name, path, config)


def _placed(rows: Sequence[Any], name: str) -> Iterator[tuple[str, Any]]:
  return ((f'{name}[{i}]', row) for i, row in enumerate(rows))


def _usable(
  rows: Iterator[tuple[str, Any]],
  name: str,
  source: str,
  config: DataConfig,
) -> Reading:
  """The records of (place, row) that a config asks for."""
  reading = records_lib.usable(
    rows,
    template=config.template,
    name=name,
    source=source,
    skip_bad_records=config.skip_bad_records,
  )
  if config.with_context:
    return reading
  without = [record for record in reading.records if not record.context]
  if not without:
    raise ValueError(
      f'{name}: every record of {source} has a context, but '
      'data.with_context is False; nothing is left.'
    )
  return reading._replace(records=without)


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
