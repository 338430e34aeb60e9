"""Reading records from JSON Lines: rows, then those that can be used.

`forms` says which forms a row may have, `record` what it becomes.
"""

import codecs
import collections
from collections.abc import Iterable, Iterator
import gzip
import io
import itertools
import json
import lzma
from typing import Any, NamedTuple
import zlib

from gemma_jax import files
from gemma_jax.data import file_kinds, forms, templates
from gemma_jax.data.fields import BadRecord
from gemma_jax.data.record import Record

# More than a million tokens of text, which one character may make 4 times as wide.
_MAX_LINE_BYTES = 6 << 20
# Of a row in memory: 800,000 token ids, 3 million characters of which one is wide or escaped.
_MAX_VALUE_BYTES = 56 << 20

# This much of the first line tells what kind of file it is.
_HEAD_BYTES = 1 << 16


class Reading(NamedTuple):
  """What a source gave.

  Attributes:
    records: in the order of the source.
    skipped: unusable rows by reason, if they may be skipped.
  """

  records: list[Record]
  skipped: collections.Counter[str]

  @property
  def unread(self) -> collections.Counter[str]:
    """How many of the records have each of the fields that nothing reads."""
    return collections.Counter(name for record in self.records for name in record.unread)

  def lines(self) -> list[str]:
    """'unread fields: id × 5,000, lang × 377', and the same of skipped rows."""
    return [
      f'{name}: ' + ', '.join(f'{key} × {n:,}' for key, n in counts.most_common())
      for name, counts in (('skipped records', self.skipped), ('unread fields', self.unread))
      if counts
    ]


def read_jsonl(path: str, name: str = 'data.path') -> Iterator[tuple[str, Any]]:
  """Reads the rows of a .jsonl, .jsonl.gz or .jsonl.xz file.

      a.jsonl        {"prompt": "1 + 1 =", "response": "2"}
      yields         ('a.jsonl line 1', {'prompt': '1 + 1 =', 'response': '2'})

  Args:
    path: on this machine, or gs://.
    name: the setting that holds the path, for error messages.

  Yields:
    (place, row) for each line that is not blank; the row is the parsed JSON, or a
    BadRecord if the line is not JSON.

  Raises:
    ValueError: no such file, one of another kind, its compression is broken, or
      a line is longer than any record. Memory in use is that of one line,
      whatever the file expands to.
  """
  file = files.path(path)
  if not file.is_file():
    raise ValueError(
      f'{name}: got {path!r}, which is not a file; expected a .jsonl, '
      '.jsonl.gz or .jsonl.xz file, tfds:NAME or sample:NAME.'
    )
  with file.open('rb') as raw:
    opened = {'.gz': gzip.open, '.xz': lzma.open}.get(file.suffix)
    # An object store's own readline does not take a limit.
    lines = opened(raw) if opened else io.BufferedReader(raw)  # pyright: ignore[reportArgumentType]: epath says IO of any
    number, is_known = 0, False
    try:
      while line := lines.readline(_MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
          line = line.removeprefix(codecs.BOM_UTF8)
        if not is_known and line.strip():
          _check_kind(line, path, name)
          is_known = True
        if len(line) > _MAX_LINE_BYTES:
          raise ValueError(
            f'{name}: {path} line {number} is longer than {_MAX_LINE_BYTES:,} '
            'bytes; expected JSON Lines, one record per line.'
          )
        if line.strip():
          yield f'{path} line {number}', parse_json(line)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as e:
      raise ValueError(
        f'{name}: {path} cannot be read after line {number}: {e}. Is it complete?'
      ) from None


def usable(
  rows: Iterable[tuple[str, Any]],
  template: str,
  name: str = 'data.path',
  source: str = '',
  skip_bad_records: bool = False,
  most: int = 0,
) -> Reading:
  """Keeps the rows that the template can use.

  Args:
    rows: (place, row), as `read_jsonl` yields them.
    template: text records are rendered with it, as a check.
    name: the setting that named the source, for error messages.
    source: the source itself, for error messages.
    skip_bad_records: count unusable rows instead of stopping at the first.
    most: stops after so many records; 0 reads all rows.

  Raises:
    ValueError: a bad row (with its place), no row, or no usable row.
  """
  skipped: collections.Counter[str] = collections.Counter()
  kept = each_usable(rows, template, name, source, skip_bad_records, skipped)
  return Reading(list(itertools.islice(kept, most or None)), skipped)


def each_usable(
  rows: Iterable[tuple[str, Any]],
  template: str,
  name: str,
  source: str,
  skip_bad_records: bool,
  skipped: collections.Counter[str],
) -> Iterator[Record]:
  """Yields the records of `usable`, and counts the rows that it skips."""
  templates.check_name(template)
  is_empty = True
  for place, row in rows:
    try:
      if isinstance(row, BadRecord):
        raise row
      record = forms.parse(row, template)
      if record.is_text:
        templates.render(template, record)
    except BadRecord as e:
      if not skip_bad_records:
        raise ValueError(
          f'{name}: {place}: {e}. Every record needs one of {forms.FORMS}; '
          'data.skip_bad_records=True drops such rows and counts them.'
        ) from None
      skipped[e.reason] += 1
    except ValueError as e:
      if not skip_bad_records:
        raise ValueError(f'{name}: {place}: {e}') from None
      skipped[f'does not fit template {template}'] += 1
    else:
      is_empty = False
      yield record
  if is_empty:
    state = 'it is empty'
    if skipped:
      reasons = ', '.join(f'{n} x {reason}' for reason, n in skipped.items())
      state = f'skipped {skipped.total()}: {reasons}'
    raise ValueError(
      f'{name}: {source} holds no usable record ({state}); expected JSON '
      f'Lines, each with one of {forms.FORMS}.'
    )


def _check_kind(line: bytes, path: str, name: str) -> None:
  """ValueError if the file is something other than JSON Lines."""
  head, suffixes = line[:_HEAD_BYTES], files.path(path).suffixes
  if kind := file_kinds.other_than_json_lines(head, suffixes):
    raise ValueError(f'{name}: {path} is {kind}.')


def parse_json(text: bytes) -> Any:
  """The JSON value that a line or a file holds, or a BadRecord."""
  try:
    decoded = text.decode()
    if files.parsed_bytes(decoded) > _MAX_VALUE_BYTES:
      return BadRecord('too long', f' (it would take more than {_MAX_VALUE_BYTES >> 20} MiB)')
    return json.loads(decoded, object_pairs_hook=_object)
  except BadRecord as e:
    return e
  except UnicodeDecodeError as e:
    return BadRecord('invalid UTF-8', f' at byte {e.start}')
  except json.JSONDecodeError as e:
    return BadRecord('invalid JSON', f' ({e.msg} at column {e.colno})')
  except ValueError as e:  # a number of too many digits
    return BadRecord('invalid JSON', f' ({e})')
  except RecursionError:
    return BadRecord('invalid JSON', ' (nested too deeply)')


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object; BadRecord if it has a key twice."""
  value = dict(pairs)
  if len(value) < len(pairs):
    counts = collections.Counter(key for key, _ in pairs)
    twice = counts.most_common(1)[0][0]
    raise BadRecord('a field occurs twice in an object', f' ("{twice}")')
  return value
