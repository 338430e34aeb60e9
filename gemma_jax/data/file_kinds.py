"""What a file of records is, if it is not JSON Lines.

The error names the kind, and the whole file is rejected: read line by line, with
bad lines skipped, other kinds would lose most of their rows.
"""

from collections.abc import Sequence
import json
import re
from typing import Any

_MAGIC = (
  (b'PAR1', 'Parquet'),
  (b'ARROW1', 'Arrow'),
  (b'\xff\xff\xff\xff', 'an Arrow stream'),
  (b'Obj\x01', 'Avro'),
  (b'\x93NUMPY', 'a NumPy array'),
  (b'\x80\x04', 'a pickle'),
  (b'\x80\x05', 'a pickle'),
  (b'PK\x03\x04', 'a ZIP archive (or a spreadsheet)'),
  (b'\x1f\x8b', 'gzip-compressed, though its name does not end in .gz'),
  (b'\xfd7zXZ\x00', 'xz-compressed, though its name does not end in .xz'),
  (b'\x28\xb5\x2f\xfd', 'Zstandard-compressed'),
  (b'BZh', 'bzip2-compressed'),
  (b'SQLite format 3\x00', 'an SQLite database'),
  (b'\x89HDF', 'HDF5'),
  (b'version https://git-lfs', 'a pointer of Git LFS, not the file itself'),
)
_ENCODINGS = (
  (b'\xff\xfe\x00\x00', 'UTF-32'),
  (b'\x00\x00\xfe\xff', 'UTF-32'),
  (b'\xff\xfe', 'UTF-16'),
  (b'\xfe\xff', 'UTF-16'),
)
_SEPARATED = {'\t': 'TSV', ',': 'CSV', ';': 'CSV'}
_COLUMN = re.compile(r'"?[\w .()-]{1,40}"?')


def other_than_json_lines(first_line: bytes, suffixes: Sequence[str] = ()) -> str:
  """Returns what kind of file begins like this; '' for JSON Lines.

      instruction,response      'CSV, ...'
      [                         'a JSON array, ...'
      {"prompt": "Hi", ...}     ''

  Args:
    first_line: the first line that is not blank, or the beginning of a long one.
    suffixes: of the file's name, ['.csv', '.gz'].
  """
  for magic, name in _MAGIC:
    if first_line.startswith(magic):
      return f'{name}; write its rows as JSON Lines'
  for mark, name in _ENCODINGS:
    if first_line.startswith(mark):
      return _recode(name)
  if b'\x00' in first_line[:2]:  # no byte order mark, but characters of two bytes
    return _recode('UTF-16')
  text = first_line.decode(errors='replace').strip()
  if text.startswith(('[', '{')):
    return _other_json(text, is_whole=first_line.endswith(b'\n'))
  if _parse(text) is not None:
    return ''  # a number or a string: a bad row
  for separator, name in _SEPARATED.items():
    columns = text.split(separator)
    if len(columns) > 1 and all(map(_COLUMN.fullmatch, columns)):
      return _table(name, text)
  for suffix, name in (('.csv', 'CSV'), ('.tsv', 'TSV')):
    if suffix in suffixes:
      return _table(name, text)
  return ''


def _other_json(text: str, is_whole: bool) -> str:
  """JSON that is not one object per line."""
  value = _parse(text)
  if text.startswith('['):
    if isinstance(value, list) and not all(isinstance(x, dict) for x in value):
      return 'lines of JSON lists; write an object for each'
    return "a JSON array; write a line for each element (jq -c '.[]' FILE > FILE.jsonl)"
  if value is not None or not is_whole or not text.endswith((',', '{', '[')):
    return ''
  if _parse(text.removesuffix(',')) is not None:
    return 'JSON objects with commas between them; take the commas out'
  return 'a JSON value over several lines; write one record per line'


def _table(name: str, header: str) -> str:
  return f'{name}, with the header {header[:80]!r}; write its rows as JSON Lines'


def _recode(name: str) -> str:
  codec = name.lower()
  return f'{name} text; save it as UTF-8 (iconv -f {codec} -t utf-8 FILE > FILE.jsonl)'


def _parse(text: str) -> Any:
  """A JSON value; None if it is not one (or null)."""
  try:
    return json.loads(text)
  except (ValueError, RecursionError):
    return None
