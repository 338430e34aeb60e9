"""Rows of every form as records: what is honoured, refused and counted."""

import hashlib
import json

import pytest

from gemma_jax.data import forms
from gemma_jax.data.record import Record, Turn

QA = {'prompt': 'Q', 'response': 'A'}
ASKED = Turn('user', 'Q')
ANSWERED = Turn('model', 'A', is_target=True)


def parse(row, template='dolly'):
  return forms.parse(row, template)


def message(role, content, **more):
  return {'role': role, 'content': content, **more}


def chat(*messages, **more):
  return {'messages': list(messages), **more}


def key(*parts):
  """What decides the side of a record in a split."""
  return hashlib.sha256(json.dumps(list(parts)).encode()).digest()


@pytest.mark.parametrize(
  'row, record',
  [
    (QA, Record((ASKED, ANSWERED), key=key('Q', ''))),
    (
      {'instruction': 'Q', 'response': 'A', 'category': 'c'},
      Record((ASKED, ANSWERED), True, category='c', key=key('Q', '')),
    ),
    (
      {'instruction': 'Q', 'input': 'C', 'output': 'A'},
      Record((Turn('user', 'Q', 'C'), ANSWERED), True, key=key('Q', 'C')),
    ),
    (
      chat(message('user', 'Q'), message('assistant', 'A', name='n'), id=7),
      Record((ASKED, ANSWERED), key=key(['user', 'Q']), unread=('messages[].name', 'id')),
    ),
    (
      {'tokens': [2, 5], 'loss_mask': [0, 1], 'text': 'a'},
      Record(tokens=(2, 5), loss_mask=(0, 1), key=key([2, 5], [0, 1]), unread=('text',)),
    ),
  ],
)
def test_forms_as_records(row, record):
  assert parse(row) == record


def test_a_pair_has_the_direction_of_the_template_and_one_key():
  pair = {'en': 'E', 'ko': 'K'}
  turns = lambda a, b: (Turn('user', a), Turn('model', b, is_target=True))
  assert parse(pair, 'en_ko') == Record(turns('E', 'K'), key=key('E', 'K'))
  assert parse(pair, 'ko_en') == Record(turns('K', 'E'), key=key('E', 'K'))
  with pytest.raises(ValueError, match='expected en_ko or ko_en'):
    parse(pair, 'dolly')


@pytest.mark.parametrize('name', ['context', 'Context', 'CONTEXT', 'input'])
@pytest.mark.parametrize('question', ['instruction', 'prompt'])
def test_a_context_is_honoured_under_each_of_its_names(name, question):
  row = {question: 'Q', name: 'C', 'response': 'A'}
  assert parse(row).dialogue[0] == Turn('user', 'Q', 'C')
  assert parse(row).context == 'C'
  assert parse(row).unread == ()


@pytest.mark.parametrize('missing', [None, float('nan'), ''])
def test_a_null_is_a_missing_field(missing):
  row = {'Instruction': 'Q', 'context': missing, 'input': 'C', 'response': 'A'}
  assert parse(row).dialogue == (Turn('user', 'Q', 'C'), ANSWERED)
  assert parse(QA | {'messages': None, 'more': missing}).turns == (ASKED, ANSWERED)


def test_system_and_history_are_turns():
  row = QA | {'system': 'S', 'history': [['Q0', 'A0']], 'context': 'C'}
  record = parse(row, 'chat')
  assert record.turns == (
    Turn('system', 'S'),
    Turn('user', 'Q0'),
    Turn('model', 'A0', is_target=True),
    Turn('user', 'Q', 'C'),
    ANSWERED,
  )
  assert record.key != parse(QA).key
  assert parse(QA | {'system': '', 'history': []}) == parse(QA)
  turns = chat(message('user', 'Q'), message('model', 'A'), system='S')
  assert parse(turns).turns == (Turn('system', 'S'), ASKED, ANSWERED)
  assert record.question == 'system: S\n\nuser: Q0\n\nmodel: A0\n\nuser: Q'
  assert parse(QA).question == 'Q'


def test_an_answer_of_weight_0_is_shown_and_not_learned():
  record = parse(
    chat(
      message('system', ''),
      message('user', 'Q', weight=0),
      message('model', '', weight=0),
      message('user', 'Q'),
      message('assistant', 'A', weight=1),
    )
  )
  assert record.turns == (Turn('system', ''), ASKED, Turn('model', ''), ASKED, ANSWERED)
  assert record.unread == ()


@pytest.mark.parametrize(
  'row, expected',
  [
    (chat(message('user', 'Q'), message('model', 'A', weight=0.5)), 'weight'),
    (chat(message('user', 'Q', weight=1), message('model', 'A')), 'weight 1'),
    (QA | {'weight': 0.5}, 'field "weight" is not 1 (found: float 0.5)'),
    (QA | {'tools': [{'name': 'f'}]}, 'field "tools" cannot be rendered'),
    (QA | {'image': 'a.png'}, 'field "image" cannot be rendered'),
    (
      chat(message('user', 'Q'), message('model', 'A', tool_calls=[{}])),
      'field "messages[1].tool_calls" cannot be rendered',
    ),
    (
      chat(message('user', 'Q'), message('model', 'A', reasoning_content='t')),
      'field "messages[1].reasoning_content" cannot be rendered',
    ),
    (
      chat(message('user', 'Q'), message('model', 'A'), tools=[{'name': 'f'}]),
      'field "tools" cannot be rendered',
    ),
    (
      chat(message('system', 'S'), message('user', 'Q'), message('model', 'A'), system='S'),
      'field "system" beside a system message',
    ),
    (
      chat(message('user', 'Q'), message('model', 'A', Thinking='t')),
      'field "messages[1].Thinking" cannot be rendered',
    ),
    (QA | {'reasoning': 'r'}, 'field "reasoning" cannot be rendered'),
    (
      chat(message('user', 'Q'), message('model', 'A'), history=[['a', 'b']]),
      'field "history" is not read in messages',
    ),
    (QA | {'loss_mask': [1]}, '"loss_mask" is not read in prompt+response'),
    (
      chat(message('user', 'Q', context='C'), message('model', 'A')),
      'field "messages[0].context" is not read in a message',
    ),
    (
      chat(message('system', 'S', weight=1), message('user', 'Q'), message('model', 'A')),
      'a message of the role system has the weight 1',
    ),
    (QA | {'weight': 0}, 'field "weight" is not 1'),
    (QA | {'history': 0}, 'field "history" is not a list of'),
    (QA | {'history': {}}, 'field "history" is not a list of'),
    (QA | {'history': [['a', 'b', 'c']]}, 'field "history" is not a list of'),
    ({'ko': 'K'}, 'field "en" is missing (found: ko)'),
    ({'Prompt': 'a', 'RESPONSE': None}, 'field "response" is null'),
    (QA | {'context': 'C', 'input': 'D'}, '"context" and "input" differ'),
    (QA | {'output': 'B'}, '"response" and "output" differ'),
    (QA | {'Prompt': 'R'}, 'fields "prompt" and "Prompt" differ'),
    (QA | {'history': ['a']}, 'field "history" is not a list of'),
    (QA | {'history': [['a', ' ']]}, 'field "history[0].response" is empty'),
    (QA | {'tokens': [2, 5]}, 'two forms at once: tokens and prompt+response'),
    (
      chat(message('user', 'Q'), message('model', 'A'), **QA),
      'two forms at once: messages and prompt+response',
    ),
    (QA | {'instruction': 'Q'}, 'two forms at once: instruction+response and prompt+response'),
  ],
)
def test_what_cannot_be_read_is_refused(row, expected):
  with pytest.raises(forms.BadRecord) as error:
    parse(row)
  assert expected in str(error.value)


def test_fields_that_say_nothing_are_neither_refused_nor_counted():
  empty = {
    'tools': [],
    'functions': {},
    'audio': '',
    'images': None,
    'weight': 1,
    'system': None,
    'history': '',
  }
  assert parse(QA | empty) == parse(QA)
  row = chat(message('user', 'Q'), message('model', 'A', tool_calls=None))
  assert parse(row).unread == ()


def test_what_precedes_the_answer_decides_the_side():
  """All of it, as it is spelled: splits made before stay as they are."""
  turns = lambda role: [message('user', 'Q'), message(role, 'A')] * 2
  rows = [
    QA,
    QA | {'context': 'C'},
    QA | {'system': 'S'},
    QA | {'history': [['a', 'b']]},
    chat(*turns('model')),
    chat(*turns('assistant')),
    chat(*turns('model'), system='S'),
    chat(*turns('model'), context='C'),
  ]
  assert len({parse(row).key for row in rows}) == len(rows)
  assert parse(QA | {'response': 'B'}).key == parse(QA).key
  assert parse(rows[4]).key == key(['user', 'Q'], ['model', 'A'], ['user', 'Q'])


def test_a_context_beside_messages_belongs_to_the_first_question():
  messages = message('system', 'S'), message('user', 'Q'), message('model', 'A')
  record = parse(chat(*messages, context='C'))
  assert record.turns[1] == Turn('user', 'Q', 'C')


def test_an_unfinished_second_form_is_an_unread_field():
  """As data sets have it: the first question beside the conversation."""
  row = chat(message('user', 'Q'), message('model', 'A'), prompt='Q', ID=1, id=2)
  assert parse(row).unread == ('prompt', 'ID', 'id')
