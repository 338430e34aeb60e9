"""The forms of a record, and what is said of a bad one."""

import gzip
import json
import lzma
import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from gemma_jax.data import forms, templates
from gemma_jax.data import records as records_lib
from tests import data_toy

GOOD = [
  {'instruction': 'Why?', 'context': 'Once.', 'response': 'So.', 'more': 1},
  {'prompt': '', 'response': '그냥.'},
  {
    'messages': [
      {'role': 'system', 'content': ''},
      {'role': 'user', 'content': 'Hi'},
      {'role': 'assistant', 'content': 'Hello'},
    ]
  },
  {'tokens': [2, 7, 1], 'loss_mask': [0, 1, 1]},
  {'tokens': [2, 7, 1]},
]


def read(path, template='dolly', **kwargs):
  """(records, skipped) of a file."""
  rows = records_lib.read_jsonl(path)
  return records_lib.usable(rows, template, source=path, **kwargs)


def parsed(*rows):
  return data_toy.records(rows)


def messages(*pairs):
  return {'messages': [{'role': r, 'content': c} for r, c in pairs]}


def test_forms_may_be_mixed(tmp_path):
  path = data_toy.write_jsonl(tmp_path / 'a.jsonl', GOOD)
  assert read(path) == (parsed(*GOOD), {})


@pytest.mark.parametrize('suffix, opener', [('gz', gzip), ('xz', lzma)])
def test_compressed_files_read_alike(tmp_path, suffix, opener):
  plain = data_toy.write_jsonl(tmp_path / 'a.jsonl', GOOD)
  path = tmp_path / f'a.jsonl.{suffix}'
  with open(plain, 'rb') as f:
    path.write_bytes(opener.compress(f.read()))
  assert read(str(path)) == (parsed(*GOOD), {})
  path.write_bytes(path.read_bytes()[:-11])
  with pytest.raises(ValueError, match=f'a.jsonl.{suffix} cannot be read'):
    read(str(path))


def test_lines_end_at_newlines_only(tmp_path):
  """Other line separators belong to the text; a blank line and a BOM do not."""
  record = {'prompt': 'a\u2028b\x0bc\x85', 'response': 'd\u2029'}
  path = tmp_path / 'a.jsonl'
  line = json.dumps(record, ensure_ascii=False)
  path.write_bytes(f'\ufeff{line}\r\n\n  \n{line}'.encode())
  assert read(str(path))[0] == parsed(record, record)


# Each row with what the message has to say of it.
BAD = [
  (
    {'instruction': 'a', 'context': 'b'},
    'field "response" is missing (found: instruction, context)',
  ),
  ({'response': 'a'}, 'field "instruction" is missing (found: response)'),
  ({'prompt': 'a'}, 'field "response" is missing (found: prompt)'),
  (
    '{"prompt": "a", "prompt": "b", "response": "c"}',
    'a field occurs twice in an object ("prompt")',
  ),
  ({'text': 'a'}, 'field "response" is missing (found: text)'),
  ({}, 'field "response" is missing (found: no field)'),
  ({'prompt': 'a', 'response': ''}, 'field "response" is empty'),
  ({'prompt': 'a', 'response': ' \n'}, 'field "response" is empty'),
  ({'prompt': 'a', 'response': None}, 'field "response" is null (found: prompt, response)'),
  ('{"prompt": "a", "response": NaN}', 'field "response" is null'),
  ({'prompt': ['a'], 'response': 'b'}, 'field "prompt" is not a string (found: '),
  (
    {'instruction': 'a', 'context': 3, 'response': 'b'},
    'field "context" is not a string (found: int 3)',
  ),
  ('{"prompt": "a", "response": "b\\ud800"}', 'lone surrogate at character 1'),
  ('[1, 2]', 'not an object (found: list [1, 2])'),
  ('"a"', 'not an object'),
  ('{"prompt": "a",', 'invalid JSON ('),
  ("{'prompt': 'a'}", 'invalid JSON ('),
  ('[' * 100_000, 'invalid JSON'),
  ({'messages': []}, 'field "messages" is not a list of messages'),
  ({'messages': 'a'}, 'field "messages" is not a list of messages'),
  ({'messages': ['a']}, 'field "messages" is not a list of messages'),
  ({'messages': [{'role': 'user'}]}, 'field "messages[0].content" is missing'),
  (messages(('user', 'a')), '(found: user)'),
  (messages(('system', 'a')), '(found: system)'),
  (messages(('model', 'a')), '(found: model)'),
  (messages(('user', 'a'), ('user', 'b'), ('model', 'c')), 'in turns'),
  (messages(('user', 'a'), ('tool', 'b')), '(found: user, tool)'),
  (messages(('user', 'a'), ('model', '')), 'field "messages[1].content" is empty'),
  (messages(('user', 'a'), ('model', 'b'), ('system', 'c')), 'in turns'),
  ({'tokens': []}, 'field "tokens" is not a list of token ids (found: list [])'),
  ({'tokens': 'ab'}, 'field "tokens" is not a list of token ids'),
  ({'tokens': [2, 3.0]}, 'field "tokens" is not a list of token ids'),
  ({'tokens': [2, -1]}, 'field "tokens" is not a list of token ids'),
  ({'tokens': [2, True]}, 'field "tokens" is not a list of token ids'),
  ({'tokens': [2, 2**31]}, 'field "tokens" is not a list of token ids'),
  ({'tokens': [2, 3], 'loss_mask': [0, 2]}, 'field "loss_mask" is not a list of 0 and 1'),
  (
    {'tokens': [2, 3], 'loss_mask': [1]},
    'field "loss_mask" is not as long as "tokens" (found: 1 and 2)',
  ),
]


@pytest.mark.parametrize('row, expected', BAD, ids=range(len(BAD)))
def test_a_bad_row_is_named_and_may_be_skipped(tmp_path, row, expected):
  path = data_toy.write_jsonl(tmp_path / 'a.jsonl', [GOOD[0], '', row, GOOD[1]])
  with pytest.raises(ValueError) as error:
    read(path)
  message = str(error.value)
  assert message.startswith(f'data.path: {path} line 3: ')
  assert expected in message
  assert 'instruction+response, prompt+response, messages, tokens or en+ko' in message
  assert 'data.skip_bad_records=True' in message
  assert '\n' not in message
  found, skipped = read(path, skip_bad_records=True)
  assert found == parsed(GOOD[0], GOOD[1])
  assert list(skipped.values()) == [1]


def test_the_message_is_the_documented_one(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  bad = {'instruction': 'a', 'context': 'b'}
  data_toy.write_jsonl(tmp_path / 'dolly.jsonl', [GOOD[0]] * 411 + [bad])
  with pytest.raises(ValueError) as error:
    read('dolly.jsonl')
  assert str(error.value) == (
    'data.path: dolly.jsonl line 412: field "response" is missing (found: '
    'instruction, context). Every record needs one of instruction+response, '
    'prompt+response, messages, tokens or en+ko; '
    'data.skip_bad_records=True drops such rows and counts them.'
  )


def test_skipped_rows_are_counted_by_reason(tmp_path):
  rows = [
    {'prompt': 'a'},
    {'prompt': 'b', 'extra': 1},
    '{',
    GOOD[0],
    'x',
    {'prompt': 'c', 'response': ''},
  ]
  path = data_toy.write_jsonl(tmp_path / 'a.jsonl', rows)
  assert read(path, skip_bad_records=True) == (
    parsed(GOOD[0]),
    {'field "response" is missing': 2, 'invalid JSON': 2, 'field "response" is empty': 1},
  )


def test_a_row_that_the_template_cannot_hold_is_named(tmp_path):
  turns = messages(('user', 'a'), ('model', 'b'), ('user', 'c'), ('assistant', 'd'))
  path = data_toy.write_jsonl(tmp_path / 'a.jsonl', [GOOD[0], turns])
  with pytest.raises(ValueError, match=r'a\.jsonl line 2: .*expected chat'):
    read(path)
  assert read(path, template='chat')[0] == parsed(GOOD[0], turns)
  found, skipped = read(path, skip_bad_records=True)
  assert found == parsed(GOOD[0])
  assert skipped == {'does not fit template dolly': 1}


def test_invalid_utf8_is_named(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'{"prompt": "a", "response": "b"}\n{"prompt": "\xff"}\n')
  with pytest.raises(ValueError, match='line 2: invalid UTF-8 at byte 12'):
    read(str(path))


@pytest.mark.parametrize(
  'rows, skip, found',
  [
    ([], False, 'it is empty'),
    (['', '  '], False, 'it is empty'),
    (['{"', {'a': 1}, '{'], True, 'skipped 3: 2 x invalid JSON, 1 x field'),
  ],
)
def test_nothing_usable_is_an_error(tmp_path, rows, skip, found):
  path = data_toy.write_jsonl(tmp_path / 'a.jsonl', rows)
  with pytest.raises(ValueError) as error:
    read(path, skip_bad_records=skip)
  assert f'data.path: {path} holds no usable record ({found}' in str(error.value)


def test_no_file(tmp_path):
  for path in (tmp_path, tmp_path / 'nope.jsonl'):
    with pytest.raises(ValueError, match=r'data\.path: got .* which is not a file'):
      read(str(path))


def test_a_path_may_begin_at_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  data_toy.write_jsonl(tmp_path / 'a.jsonl', GOOD)
  assert read('~/a.jsonl') == read(str(tmp_path / 'a.jsonl'))


def test_an_unknown_template_is_found_before_reading(tmp_path):
  path = data_toy.write_jsonl(tmp_path / 'a.jsonl', GOOD)
  with pytest.raises(ValueError, match=r'data\.template'):
    read(path, template='nope', skip_bad_records=True)


json_values = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(
      st.sampled_from(
        [
          'instruction',
          'context',
          'Context',
          'input',
          'response',
          'output',
          'prompt',
          'messages',
          'role',
          'content',
          'weight',
          'system',
          'history',
          'tools',
          'tokens',
          'loss_mask',
          'en',
          'ko',
          'id',
        ]
      ),
      inner,
      max_size=3,
    )
  ),
  max_leaves=11,
)


@settings(deadline=None)
@given(json_values)
def test_any_value_is_a_record_or_a_bad_one(value):
  """Nothing but BadRecord comes out, and what passes can be rendered."""
  is_pair = isinstance(value, dict) and {'en', 'ko'} <= value.keys()
  template = 'en_ko' if is_pair else 'chat'
  try:
    record = forms.parse(value, template)
  except forms.BadRecord as e:
    assert str(e).startswith(e.reason)
    return
  assert isinstance(value, dict)
  if record.is_text and not (is_pair and len(record.dialogue) > 2):
    assert templates.render(template, record)


@pytest.mark.parametrize('suffix, opener', [('gz', gzip), ('xz', lzma)])
def test_a_line_that_expands_without_end_is_refused_in_little_memory(tmp_path, suffix, opener):
  """64 MiB of one line, from some kilobytes."""
  path = tmp_path / f'bomb.jsonl.{suffix}'
  with opener.open(path, 'wb') as f:
    for _ in range(64):
      f.write(b' ' * (1 << 20))
  tracemalloc.start()
  try:
    with pytest.raises(ValueError, match='line 1 is longer than 6,291,456'):
      list(records_lib.read_jsonl(str(path)))
    assert tracemalloc.get_traced_memory()[1] < 40 << 20
  finally:
    tracemalloc.stop()


def test_a_number_of_too_many_digits_is_a_bad_record(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"tokens": [' + '1' * 5000 + ']}\n')
  with pytest.raises(ValueError, match=r'a\.jsonl line 1: invalid JSON'):
    records_lib.usable(records_lib.read_jsonl(str(path)), 'dolly')


def test_a_row_of_too_many_values_is_a_bad_record(tmp_path):
  """6 MiB of empty lists, from kilobytes, would be 150 MB."""
  path = tmp_path / 'a.jsonl.gz'
  row = b'{"prompt": "a", "response": "b", "x": [' + b'[],' * 2_000_000 + b'1]}\n'
  path.write_bytes(gzip.compress(row))
  tracemalloc.start()
  try:
    with pytest.raises(ValueError, match='line 1: too long'):
      records_lib.usable(records_lib.read_jsonl(str(path)), 'dolly')
    assert tracemalloc.get_traced_memory()[1] < 40 << 20
  finally:
    tracemalloc.stop()


def test_a_row_of_800_000_token_ids_is_read(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text(json.dumps({'tokens': [2, *range(300, 800_300)]}, separators=(',', ':')))
  (record,) = records_lib.usable(records_lib.read_jsonl(str(path)), 'dolly').records
  assert len(record.tokens) == 800_001
