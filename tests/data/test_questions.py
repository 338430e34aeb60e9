"""What a model is asked is what training showed it, token for token."""

import logging

import pytest

from gemma_jax.data import examples, forms, templates
from gemma_jax.data.record import Record, Turn
from tests import data_toy

TOKENIZER = data_toy.make_tokenizer()
SINGLE = ('dolly', 'plain', 'korean', 'en_ko', 'ko_en')
SAID = ' Hi<eos>\n'  # white space, and a control token that may be parsed


def message(role, text, **more):
  return {'role': role, 'content': text, **more}


USER, MODEL = message('user', SAID), message('assistant', 'ab\n')
AROUND = {'context': ' aHi\n', 'system': 'us '}

# Each form of one question: the row without its answer, and the answer's fields.
ONE = {
  'instruction': ({'instruction': SAID}, {'response': 'ab'}),
  'instruction, output': ({'Instruction': SAID, 'category': 'c'}, {'output': ' ab'}),
  'prompt': ({'prompt': SAID}, {'response': 'ab'}),
  'messages': ({'messages': [USER]}, {'messages': [USER, MODEL]}),
}
ABOUT = {
  'instruction and context': ({'instruction': SAID, 'input': 'aHi'}, {'response': 'ab'}),
  'instruction and all': ({'instruction': SAID, **AROUND}, {'response': 'ab'}),
  'prompt and all': ({'prompt': SAID, **AROUND}, {'response': 'ab'}),
  'no text': ({'prompt': '', **AROUND}, {'response': 'ab'}),
  'messages and all': ({'messages': [USER], **AROUND}, {'messages': [USER, MODEL]}),
  'system message': (
    {'messages': [message('system', ' us '), USER]},
    {'messages': [message('system', ' us '), USER, MODEL]},
  ),
}
TURNS = {
  'history': ({'prompt': SAID, 'history': [['a', 'b '], ['', 'user']]}, {'response': 'ab'}),
  'history and all': ({'prompt': SAID, 'history': [['a', 'b']], **AROUND}, {'response': 'ab'}),
  'turns': ({'messages': [USER, MODEL, USER]}, {'messages': [USER, MODEL, USER, MODEL]}),
  'turns and all': (
    {'messages': [USER, MODEL, USER], **AROUND},
    {'messages': [USER, MODEL, USER, MODEL]},
  ),
  'a turn of weight 0': (
    {'messages': [USER, MODEL | {'weight': 0}, USER]},
    {'messages': [USER, MODEL | {'weight': 0}, USER, MODEL]},
  ),
}
CASES = [
  *((template, ONE[name], name) for template in (*SINGLE, 'chat') for name in ONE),
  *((t, ABOUT[name], name) for t in ('dolly', 'plain', 'korean', 'chat') for name in ABOUT),
  *(('chat', case, name) for name, case in TURNS.items()),
  ('en_ko', ({'en': SAID}, {'ko': '가'}), 'pair'),
  ('ko_en', ({'ko': SAID}, {'en': 'ab'}), 'pair'),
]
cases = pytest.mark.parametrize(
  ('template', 'case'), [case[:2] for case in CASES], ids=[f'{c[0]}, {c[2]}' for c in CASES]
)


def ask(asked, template, parse=False):
  return examples.prompt_tokens(TOKENIZER, template, forms.question(asked, template), parse)


def train(row, template, parse=False):
  """(tokens, loss mask) of a row."""
  made = examples.make_examples(
    [forms.parse(row, template)], TOKENIZER, template, parse_control_tokens=parse
  )
  return made[0].tokens.tolist(), made[0].loss_mask.tolist()


@pytest.mark.parametrize('parse', [False, True], ids=['', 'parsed'])
@cases
def test_a_question_is_what_precedes_the_answer_in_training(template, case, parse):
  question, answer = case
  whole = question | answer
  tokens, mask = train(whole, template, parse)
  start = ask(question, template, parse)
  assert tokens[: len(start)] == start
  assert mask[len(start) - 1] == 0 and set(mask[len(start) :]) == {1}
  # A record of training is asked as it is.
  assert ask(whole, template, parse) == start
  assert ask(forms.parse(whole, template), template, parse) == start
  if parse:  # <eos> is one token of each question
    assert start.count(TOKENIZER.eos_id) == str(question).count('<eos>')


def test_every_template_is_here():
  assert {case[0] for case in CASES} == set(templates._TEMPLATES)
  assert forms._FORMS[0].name == 'tokens'
  assert {form.name.split('+')[0] for form in forms._FORMS[1:]} == {
    *('messages', 'instruction', 'prompt', 'en')
  }


@pytest.mark.parametrize('template', ['chat', 'dolly'])
def test_a_text_and_messages_are_questions(template):
  want = ask({'prompt': SAID}, template)
  assert ask(SAID, template) == ask([USER], template) == ask([USER, MODEL], template) == want
  assert ask(Record((Turn('user', SAID),)), template) == want


@pytest.mark.parametrize(
  ('mask', 'asked'),
  [
    ([0, 0, 1, 1], 2),
    ([0, 1, 0, 1], 3),
    ([0, 1, 1, 0], 4),  # the answer is still to come
    ([0, 0, 0, 0], 4),
    ([1, 1, 1, 1], 1),  # nothing predicts the first
    (None, 4),
  ],
)
def test_token_ids_ask_with_what_precedes_those_that_count_at_the_end(mask, asked):
  row = {'tokens': [2, 7, 8, 9], 'loss_mask': mask}
  ids = examples.prompt_tokens(None, 'dolly', forms.question(row, 'dolly'))
  assert ids == [2, 7, 8, 9][:asked]


@pytest.mark.parametrize(
  ('template', 'asked', 'message'),
  [
    *(
      (t, case[0], 'expected chat .the others hold one') for t in SINGLE for case in TURNS.values()
    ),
    *((t, AROUND | {'prompt': 'a'}, 'expected only a sentence') for t in SINGLE[3:]),
    ('dolly', {'en': 'a'}, "'dolly' for a pair"),
    ('ko_en', {'en': 'a'}, '^prompt: field "ko" is missing'),
    ('ko_en', {'ko': ' ', 'en': 'a'}, 'field "ko" is empty'),
    ('dolly', {'prompt': 'a', 'instruction': 'a'}, 'two forms at once'),
    ('dolly', {'question': 'a'}, 'field "instruction" is missing .found: question.*needs no resp'),
    ('dolly', {'response': 'a'}, 'field "instruction" is missing'),
    ('dolly', {'prompt': 7}, '"prompt" is not a string'),
    ('dolly', {'prompt': 'a', 'response': 7}, '"response" is not a string'),
    ('dolly', {'prompt': 'a', 'tools': [1]}, '"tools" cannot be rendered'),
    ('dolly', {'prompt': 'a', 'history': [['a', ' ']]}, 'response" is empty'),
    ('chat', [MODEL], 'from a user to a user.*found: model'),
    ('chat', [USER, USER], 'found: user, user'),
    ('chat', [message('system', 'a')], 'found: system'),
    ('chat', [], 'not a list of messages'),
    ('chat', [USER, message('model', ' '), USER], r'messages\[1\].content" is empty'),
    ('dolly', 7, 'not a list of messages'),
  ],
)
def test_what_cannot_be_asked_is_refused(template, asked, message):
  with pytest.raises(ValueError, match=message):
    ask(asked, template)


def test_a_text_needs_a_tokenizer():
  with pytest.raises(ValueError, match=r'model\.tokenizer: got none'):
    examples.prompt_tokens(None, 'dolly', forms.question('a', 'dolly'))


def test_fields_that_nothing_reads_are_said(caplog):
  with caplog.at_level(logging.WARNING):
    ask({'prompt': 'a', 'contxt': 'b'}, 'dolly')
  assert caplog.messages == ['prompt has fields that nothing reads: contxt']
