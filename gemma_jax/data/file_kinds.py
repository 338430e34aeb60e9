"""What a file of records is, if it is not JSON Lines.

It is said by name, and the file is refused whole: read line by line, with bad
lines skipped, other kinds would lose most of their rows.
"""

import json

_MAGIC = (
  (b'PAR1', 'Parquet'),
  (b'ARROW1', 'Arrow'),
  (b'Obj\x01', 'Avro'),
  (b'PK\x03\x04', 'a ZIP archive (or a spreadsheet)'),
  (b'\x1f\x8b', 'gzip-compressed, though its name does not end in .gz'),
  (b'\xfd7zXZ\x00', 'xz-compressed, though its name does not end in .xz'),
  (b'\x28\xb5\x2f\xfd', 'Zstandard-compressed'),
  (b'BZh', 'bzip2-compressed'),
  (b'SQLite format 3\x00', 'an SQLite database'),
  (b'\x89HDF', 'HDF5'),
)
_ENCODINGS = (
  (b'\xff\xfe\x00\x00', 'UTF-32'),
  (b'\x00\x00\xfe\xff', 'UTF-32'),
  (b'\xff\xfe', 'UTF-16'),
  (b'\xfe\xff', 'UTF-16'),
)
_AS_LINES = "jq -c '.[]' FILE > FILE.jsonl"


def other_than_json_lines(first_line: bytes) -> str:
  """What a file is that begins so; '' for JSON Lines.

      b'instruction,response'     'CSV, ...'
      b'['                        'a JSON array, ...'
      b'{"prompt": "Hi", ...}'    ''

  Args:
    first_line: the first that is not blank, or the beginning of a long one.
  """
  for magic, name in _MAGIC:
    if first_line.startswith(magic):
      return f'{name}; write its rows as JSON Lines'
  for mark, name in _ENCODINGS:
    if first_line.startswith(mark):
      codec = name.lower()
      return (
        f'{name} text; save it as UTF-8 (iconv -f {codec} -t utf-8 FILE > '
        'FILE.jsonl)'
      )
  text = first_line.decode(errors='replace').strip()
  if text.startswith('['):
    return f'a JSON array; write a line for each element ({_AS_LINES})'
  if text.startswith('{'):
    is_open = text.endswith((',', '{', '[')) and not _parses(text)
    whole = 'a JSON value over several lines; write a record a line'
    return whole if is_open else ''
  if _parses(text):
    return ''  # a number or a string, in a row of its own
  for separator, name in (('\t', 'TSV'), (',', 'CSV')):
    if separator in text:
      return (
        f'{name}, with the header {text[:80]!r}; write its rows as JSON Lines'
      )
  return ''


def _parses(text: str) -> bool:
  try:
    json.loads(text)
  except (ValueError, RecursionError):
    return False
  return True
