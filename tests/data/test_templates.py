"""Templates render conversations; generation and training agree."""

import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from gemma_jax.data import forms, templates
from gemma_jax.data.record import Record, Turn, asking
from gemma_jax.data.templates import Span
from tests import data_toy

SINGLE = ('dolly', 'plain', 'korean', 'en_ko', 'ko_en')
START = Span('<start_of_turn>', is_control=True)
END = Span('<end_of_turn>', is_control=True)
LEARNED_END = Span('<end_of_turn>', is_control=True, is_answer=True, is_target=True)
GOLDEN = Path(__file__).parents[1] / 'golden'


def answer(text):
  return Span(text, is_answer=True, is_target=True)


def render(template, row):
  """The spans of a row of any form."""
  return templates.render(template, forms.parse(row, template))


def messages(*contents, system=None):
  roles = ('user', 'assistant')
  turns = [{'role': roles[i % 2], 'content': content} for i, content in enumerate(contents)]
  first = [{'role': 'system', 'content': system}] if system else []
  return {'messages': first + turns}


def test_dolly():
  record = {'instruction': 'Why?', 'context': '', 'response': 'So.'}
  prompt = Span('Instruction:\nWhy?\n\nResponse:\n')
  assert render('dolly', record) == [prompt, answer('So.')]
  record['context'] = 'Once.'
  prompt = Span('Instruction:\nWhy?\n\nContext:\nOnce.\n\nResponse:\n')
  assert render('dolly', record) == [prompt, answer('So.')]


def test_plain_is_the_texts_as_they_are():
  record = {'prompt': ' 1 + 1 =', 'response': ' 2\n'}
  assert render('plain', record) == [Span(' 1 + 1 ='), answer(' 2\n')]


def test_korean():
  record = {'instruction': '왜?', 'context': '옛날에.', 'response': '그냥.'}
  assert render('korean', record) == [
    Span('질문:\n왜?\n\n맥락:\n옛날에.\n\n답변:\n'),
    answer('그냥.'),
  ]


def test_a_pair_is_translated_in_the_direction_of_the_template():
  pair = {'en': 'Hi.', 'ko': '안녕.'}
  to_korean = 'Translate English to Korean.\n\nEnglish:\nHi.\n\nKorean:\n'
  to_english = 'Translate Korean to English.\n\nKorean:\n안녕.\n\nEnglish:\n'
  assert render('en_ko', pair) == [Span(to_korean), answer('안녕.')]
  assert render('ko_en', pair) == [Span(to_english), answer('Hi.')]
  as_prompt = {'prompt': 'Hi.', 'response': '안녕.'}
  assert render('en_ko', pair) == render('en_ko', as_prompt)
  with pytest.raises(ValueError, match='expected en_ko or ko_en'):
    render('dolly', pair)


def test_chat_learns_every_model_turn_and_its_end():
  record = messages('Q1', 'A1', ' Q2 ', 'A2\n', system='Be brief.')
  assert render('chat', record) == [
    START,
    Span('user\nBe brief.\n\nQ1'),
    END,
    Span('\n'),
    START,
    Span('model\n'),
    answer('A1'),
    LEARNED_END,
    Span('\n'),
    START,
    Span('user\nQ2'),
    END,
    Span('\n'),
    START,
    Span('model\n'),
    answer('A2'),
    LEARNED_END,
  ]


def test_chat_is_what_the_released_template_says():
  """Edges of white space, empty texts and systems; see golden/README.md."""
  path = GOLDEN / 'chat_template_gemma3.json'
  cases = json.loads(path.read_text('utf-8'))['cases']
  roles = {'system': 'system', 'user': 'user', 'assistant': 'model'}
  for case in cases:
    turns = tuple(Turn(roles[m['role']], m['content']) for m in case['messages'])
    spans = templates.render('chat', Record(turns))
    text = '<bos>' + ''.join(span.text for span in spans)
    # A finished conversation ends with EOS here, with a new line there.
    end = '\n' if turns[-1].role == 'model' else ''
    assert text + end == case['text'], case['messages']
  assert len(cases) == 24


def test_chat_strips_a_question_with_its_context_as_one_text():
  row = {'prompt': ' Q ', 'context': ' C\n', 'response': 'A', 'system': ' S '}
  assert render('chat', row)[1] == Span('user\n S \n\nQ \n\n C')
  assert render('chat', row | {'prompt': ''})[1] == Span('user\n S \n\nC')


def test_an_answer_of_weight_0_is_no_target():
  row = messages('Q1', 'A1', 'Q2', 'A2')
  row['messages'][1]['weight'] = 0
  spans = render('chat', row)
  assert [s.text for s in spans if s.is_target] == ['A2', '<end_of_turn>']
  assert [s.text for s in spans if s.is_answer] == ['A1', '<end_of_turn>', 'A2', '<end_of_turn>']


@pytest.mark.parametrize('template', (*SINGLE, 'chat'))
def test_forms_of_one_question_render_alike(template):
  rows = [
    {'instruction': 'Why?', 'response': 'So.', 'category': 'open_qa'},
    {'instruction': 'Why?', 'context': None, 'response': 'So.'},
    {'prompt': 'Why?', 'response': 'So.'},
    messages('Why?', 'So.'),
  ]
  rendered = [render(template, row) for row in rows]
  assert all(spans == rendered[0] for spans in rendered)


@pytest.mark.parametrize('template', (*SINGLE, 'chat'))
@settings(deadline=None)
@given(prompt=st.text(), response=st.text())
def test_generation_starts_from_what_training_showed(template, prompt, response):
  """The spans before the first target are those of the question alone."""
  record = Record((Turn('user', prompt), Turn('model', response, '', True)))
  spans = templates.render(template, record)
  start = templates.render(template, asking(prompt))
  assert spans[: len(start)] == start
  assert not any(span.is_target for span in start)
  assert all(span.is_target for span in spans[len(start) :])
  assert len(spans) > len(start)


@pytest.mark.parametrize('template', templates.TRANSLATIONS)
@pytest.mark.parametrize('field', ['system', 'context'])
def test_a_translation_takes_a_sentence_alone(template, field):
  """Anything else would be translated with it."""
  with pytest.raises(ValueError, match='expected only a sentence'):
    render(template, {'en': 'Hi.', 'ko': '안녕.', field: 'Be formal.'})


@pytest.mark.parametrize('template', ('dolly', 'plain', 'korean', 'chat'))
def test_context_and_system_reach_the_model(template):
  record = {'instruction': 'Why?', 'context': 'Once.', 'response': 'So.'}
  text = ''.join(span.text for span in render(template, record))
  assert 'Why?' in text
  assert 'Once.' in text
  record = messages('Why?', 'So.', system='Be brief.')
  text = ''.join(span.text for span in render(template, record))
  assert text.index('Be brief.\n\nWhy?') < text.index('So.')


@pytest.mark.parametrize('template', SINGLE)
def test_several_turns_need_chat(template):
  record = messages('Q1', 'A1', 'Q2', 'A2')
  with pytest.raises(ValueError, match=r'4 turns.*data\.template=chat'):
    render(template, record)


def test_an_unknown_template_lists_those_there_are():
  for call in (
    lambda: templates.check_name('dollly'),
    lambda: templates.render('dollly', Record((Turn('user', ''),))),
  ):
    with pytest.raises(ValueError, match="'dollly', expected one of dolly, chat"):
      call()


@pytest.mark.real
def test_chat_is_the_released_format():
  """transformers' ids of the same turns, with the control tokens parsed."""
  from gemma_jax.data import examples
  from gemma_jax.formats import open_base

  golden = GOLDEN / 'oracle_gemma3_270m.json'
  text = '<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n'
  rows = json.loads(golden.read_text())['tokenizer']
  (expected,) = [row['hf'] for row in rows if row['text'] == text]
  tokenizer = open_base.open_base('gemma3_270m').tokenizer()
  ids = examples.prompt_tokens(tokenizer, 'chat', asking('Hi'))
  assert ids == [tokenizer.bos_id, *expected]


def test_toy_turns_have_their_ids():
  from gemma_jax.data import examples

  tokenizer = data_toy.make_tokenizer()
  ids = examples.prompt_tokens(tokenizer, 'chat', asking('Hi'))
  start, end = (tokenizer.control_id(name) for name in data_toy.TURNS)
  text = tokenizer.encode('user\nHi')
  newline = tokenizer.encode('\n')
  model = tokenizer.encode('model\n')
  assert ids == [2, start, *text, end, *newline, start, *model]
