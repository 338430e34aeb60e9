"""Records: the forms a row may have, and reading them from JSON Lines.

    {"instruction", "context"?, "response", "category"?}
    {"prompt", "response"}
    {"messages": [{"role", "content"}, ...]}    # user, model, ..., see below
    {"tokens": [ids], "loss_mask": [0|1]?}
    {"en", "ko"}                                # for templates en_ko and ko_en

Messages are an optional system message, then user and model (or assistant) in
turns, ending with a model. Other fields are ignored. A row that is several of
these at once is taken as tokens, else messages, else instruction, else prompt.
"""

import collections
from collections.abc import Iterable, Iterator, Mapping
import gzip
import io
import json
import lzma
from typing import Any
import zlib

from gemma_jax import files
from gemma_jax.data import templates

Record = dict[str, Any]

# Some millions of tokens; and what JSON of that size can become in memory (a
# list of empty lists) stays below 200 MB.
_MAX_LINE_BYTES = 1 << 23

_FORMS = 'instruction+response, prompt+response, messages or tokens'


class BadRecord(ValueError):
  """Why a row cannot be used.

  Attributes:
    reason: the kind of defect, by which skipped rows are counted.
  """

  def __init__(self, reason: str, detail: str = ''):
    super().__init__(reason + detail)
    self.reason = reason


def check_record(record: Any):
  """Raises BadRecord unless `record` has one of the forms above."""
  if not isinstance(record, dict):
    raise BadRecord('not an object', f' (found: {_kind(record)})')
  if 'tokens' in record:
    _check_tokens(record)
  elif 'messages' in record:
    _check_messages(record['messages'])
  elif 'instruction' in record:
    _check_text(record, 'instruction')
    if record.get('context') is not None:
      _check_text(record, 'context')
    _check_answer(record, 'response')
  elif 'prompt' in record:
    _check_text(record, 'prompt')
    _check_answer(record, 'response')
  elif 'en' in record or 'ko' in record:
    _check_answer(record, 'en')
    _check_answer(record, 'ko')
  else:
    missing = 'instruction' if 'response' in record else 'response'
    raise _missing(record, missing)


def read_jsonl(path: str, name: str = 'data.path') -> Iterator[tuple[str, Any]]:
  """Reads the rows of a .jsonl, .jsonl.gz or .jsonl.xz file.

      a.jsonl        {"prompt": "1 + 1 =", "response": "2"}
      yields         ('a.jsonl line 1', {'prompt': '1 + 1 =', 'response': '2'})

  Args:
    path: of this machine, or gs://.
    name: the setting that holds the path, for error messages.

  Yields:
    (place, row) for each line that is not blank; the row is what JSON says, or
    a BadRecord where the line is no JSON.

  Raises:
    ValueError: no such file, its compression is broken, or a line is longer
      than any record. Memory is that of a line, whatever the file expands to.
  """
  file = files.path(path)
  if not file.is_file():
    raise ValueError(
      f'{name}: got {path!r}, which is no file; expected a .jsonl, .jsonl.gz '
      'or .jsonl.xz file, tfds:NAME or sample:NAME.'
    )
  with file.open('rb') as raw:
    opened = {'.gz': gzip.open, '.xz': lzma.open}.get(file.suffix)
    # An object store's own readline takes no limit.
    lines = opened(raw) if opened else io.BufferedReader(raw)
    number = 0
    try:
      while line := lines.readline(_MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > _MAX_LINE_BYTES:
          raise ValueError(
            f'{name}: {path} line {number} is longer than {_MAX_LINE_BYTES:,} '
            'bytes; expected JSON Lines, a record a line.'
          )
        if line.strip():
          yield f'{path} line {number}', _parse(line, first=number == 1)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as e:
      raise ValueError(
        f'{name}: {path} cannot be read after line {number}: {e}. Is it whole?'
      ) from None


def usable(
  rows: Iterable[tuple[str, Any]],
  template: str,
  name: str = 'data.path',
  source: str = '',
  skip_bad_records: bool = False,
) -> tuple[list[Record], dict[str, int]]:
  """Keeps the rows that the template can use.

  Args:
    rows: (place, row), as `read_jsonl` yields them.
    template: text records are rendered with it, as a check.
    name: the setting that named the source, for error messages.
    source: the source itself, for error messages.
    skip_bad_records: count unusable rows instead of stopping at the first.

  Returns:
    The records in their order, and the number of skipped rows by reason.

  Raises:
    ValueError: a bad row (with its place), no row, or no usable row.
  """
  templates.check_name(template)
  records = []
  skipped = collections.Counter()
  for place, row in rows:
    try:
      if isinstance(row, BadRecord):
        raise row
      check_record(row)
      if 'tokens' not in row:
        templates.render(template, row)
    except BadRecord as e:
      if not skip_bad_records:
        raise ValueError(
          f'{name}: {place}: {e}. Every record needs one of {_FORMS}; '
          '--config.data.skip_bad_records=True drops such rows and counts '
          'them.'
        ) from None
      skipped[e.reason] += 1
    except ValueError as e:
      if not skip_bad_records:
        raise ValueError(f'{name}: {place}: {e}') from None
      skipped[f'does not fit template {template}'] += 1
    else:
      records.append(row)
  if not records:
    found = 'it is empty'
    if skipped:
      reasons = ', '.join(f'{n} x {reason}' for reason, n in skipped.items())
      found = f'skipped {skipped.total()}: {reasons}'
    raise ValueError(
      f'{name}: {source} holds no usable record ({found}); expected JSON '
      f'Lines, each with one of {_FORMS}.'
    )
  return records, dict(skipped)


def _parse(line: bytes, first: bool) -> Any:
  """A line's JSON value, or a BadRecord."""
  try:
    return json.loads(line.decode('utf-8-sig' if first else 'utf-8'))
  except UnicodeDecodeError as e:
    return BadRecord('invalid UTF-8', f' at byte {e.start}')
  except json.JSONDecodeError as e:
    return BadRecord('invalid JSON', f' ({e.msg} at column {e.colno})')
  except ValueError as e:  # a number of too many digits
    return BadRecord('invalid JSON', f' ({e})')
  except RecursionError:
    return BadRecord('invalid JSON', ' (nested too deeply)')


def _check_text(fields: Mapping[str, Any], key: str, prefix: str = ''):
  """The field is there, a string, and valid Unicode."""
  if key not in fields:
    raise _missing(fields, key, prefix)
  value = fields[key]
  if not isinstance(value, str):
    raise BadRecord(
      f'field "{prefix}{key}" is no string', f' (found: {_kind(value)})'
    )
  try:
    value.encode()
  except UnicodeEncodeError as e:
    raise BadRecord(
      f'field "{prefix}{key}" is not valid Unicode',
      f' (lone surrogate at character {e.start})',
    ) from None


def _check_answer(fields: Mapping[str, Any], key: str, prefix: str = ''):
  """A text that is to be learned, so that it must say something."""
  _check_text(fields, key, prefix)
  if not fields[key].strip():
    raise BadRecord(f'field "{prefix}{key}" is empty')


def _check_messages(messages: Any):
  """[system], user, model, ..., user, model."""
  if not isinstance(messages, list) or not messages:
    raise BadRecord(
      'field "messages" is no list of messages', f' (found: {_kind(messages)})'
    )
  roles = []
  for i, message in enumerate(messages):
    prefix = f'messages[{i}].'
    if not isinstance(message, dict):
      raise BadRecord(
        'field "messages" is no list of messages',
        f' (found: {_kind(message)} at {i})',
      )
    _check_text(message, 'role', prefix)
    role = message['role'].replace('assistant', 'model')
    if role == 'model':
      _check_answer(message, 'content', prefix)
    else:
      _check_text(message, 'content', prefix)
    roles.append(role)
  turns = roles[1:] if roles[0] == 'system' else roles
  if not turns or turns != ['user', 'model'] * (len(turns) // 2):
    raise BadRecord(
      'field "messages" must hold user and model (or assistant) in turns, '
      'from a user to a model, after at most one system message',
      f' (found: {", ".join(roles)})',
    )


def _check_tokens(record: Mapping[str, Any]):
  """Ids, and as many zeros and ones where there is a mask."""
  tokens = record['tokens']
  mask = record.get('loss_mask')
  if (
    not isinstance(tokens, list)
    or not tokens
    or not all(type(t) is int and 0 <= t < 2**31 for t in tokens)
  ):
    raise BadRecord(
      'field "tokens" is no list of token ids', f' (found: {_kind(tokens)})'
    )
  if mask is None:
    return
  if not isinstance(mask, list) or not all(m in (0, 1) for m in mask):
    raise BadRecord(
      'field "loss_mask" is no list of 0 and 1', f' (found: {_kind(mask)})'
    )
  if len(mask) != len(tokens):
    raise BadRecord(
      'field "loss_mask" is not as long as "tokens"',
      f' (found: {len(mask)} and {len(tokens)})',
    )


def _missing(
  fields: Mapping[str, Any], key: str, prefix: str = ''
) -> BadRecord:
  found = ', '.join(fields) or 'no field'
  return BadRecord(f'field "{prefix}{key}" is missing', f' (found: {found})')


def _kind(value: Any) -> str:
  """A value in an error message: its type, and its text if that is short."""
  text = repr(value)
  name = type(value).__name__
  return f'{name} {text}' if len(text) <= 40 else name
