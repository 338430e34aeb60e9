"""Files of other kinds are named, and refused whole."""

import json

import pytest

from gemma_jax.data import records

ROWS = [{'prompt': 'Say red.', 'response': 'red'}] * 3
LINES = ''.join(json.dumps(row) + '\n' for row in ROWS)


@pytest.mark.parametrize(
  'content, kind',
  [
    (b'PAR1\x15\x04', 'Parquet'),
    (b'ARROW1\x00\x00', 'Arrow'),
    (b'\x1f\x8b\x08\x00', 'gzip-compressed'),
    (b'version https://git-lfs.github.com/spec/v1\n', 'a pointer of Git LFS'),
    (b'\x80\x04\x95', 'a pickle'),
    (LINES.encode('utf-16-le'), 'UTF-16 text'),
    ('prompt;response\nSay red.;red\n', 'CSV, with the header'),
    ('["Say red.", "red"]\n', 'lines of JSON lists'),
    (LINES.replace('}', '},'), 'JSON objects with commas between them'),
    (LINES.encode('utf-16'), 'UTF-16 text'),
    (LINES.encode('utf-16-be').replace(b'', b'\xfe\xff', 1), 'UTF-16 text'),
    (json.dumps(ROWS), 'a JSON array'),
    (json.dumps(ROWS, indent=2), 'a JSON array'),
    ('\ufeff\n[\n' + LINES.replace('}', '},') + ']', 'a JSON array'),
    (json.dumps({'data': ROWS}, indent=2), 'a JSON value over several lines'),
    ('prompt,response\r\nSay red.,red\r\n', "CSV, with the header 'prompt,re"),
    ('prompt\tresponse\nSay red.\tred\n', 'TSV, with the header'),
  ],
)
@pytest.mark.parametrize('skip', [False, True])
def test_another_kind_is_named_and_loses_no_row(tmp_path, content, kind, skip):
  """Skipping bad lines must not leave the few that happen to be JSON."""
  path = tmp_path / 'a.jsonl'
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(ValueError) as error:
    records.usable(records.read_jsonl(str(path)), 'plain', skip_bad_records=skip)
  assert f'{path} is {kind}' in str(error.value)
  assert 'skip_bad_records' not in str(error.value)


@pytest.mark.parametrize(
  'first',
  [
    '{"prompt": "a", "response": ',
    '{"prompt": "' + 'a' * 65_522 + '", ' + 'a' * 9,
    '"a, b"',
    '1',
    'hello',
    '# mine, v2',
    '{]',
  ],
)
def test_a_bad_first_line_is_a_bad_line(tmp_path, first):
  path = tmp_path / 'a.jsonl'
  path.write_text(f'{first}\n{LINES}', encoding='utf-8')
  reading = records.usable(records.read_jsonl(str(path)), 'plain', skip_bad_records=True)
  assert len(reading.records) == 3
  assert reading.skipped.total() == 1


def test_a_csv_of_one_column_is_known_by_its_name(tmp_path):
  path = tmp_path / 'a.csv'
  path.write_text('text\nhello\n', encoding='utf-8')
  with pytest.raises(ValueError, match=r"a\.csv is CSV, with the header 'text'"):
    list(records.read_jsonl(str(path)))
