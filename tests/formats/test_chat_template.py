"""Our templates in Jinja say what `data.templates` says, or raise."""

import logging

import pytest

from gemma_jax.data import templates
from gemma_jax.data.record import asking
from gemma_jax.formats import chat_template
from tests import data_toy

sandbox = pytest.importorskip('jinja2.sandbox')

NAMES = ('dolly', 'chat', 'plain', 'korean', 'en_ko', 'ko_en')
TEXTS = ('Hi', '  two\n\nlines \n', '', 'it\'s \\n {{ x }} "quoted" 서울')


class Refused(Exception):
  pass


def render(template, messages, generate=True, trim_blocks=True):
  """As transformers renders one (`trim_blocks`), or with Jinja's defaults.

  With the end of sequence that a chat model's folder may name.
  """

  def refuse(message):
    raise Refused(message)

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=trim_blocks, lstrip_blocks=trim_blocks
  )
  environment.globals['raise_exception'] = refuse
  return environment.from_string(template).render(
    messages=messages, add_generation_prompt=generate, bos_token='<bos>', eos_token='<end_of_turn>'
  )


def message(role, text):
  return {'role': role, 'content': text}


def spelled(spans):
  return '<bos>' + ''.join(span.text for span in spans)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('trim_blocks', [True, False])
def test_a_question_is_the_prompt_of_generation(name, trim_blocks):
  template = chat_template.jinja(name)
  for text in TEXTS:
    got = render(template, [message('user', text)], True, trim_blocks)
    assert got == spelled(templates.render(name, asking(text)))
    parts = message('user', [{'type': 'text', 'text': text}])
    assert render(template, [parts], True, trim_blocks) == got


@pytest.mark.parametrize('name', NAMES)
def test_an_answer_follows_the_prompt_and_ends(name):
  template = chat_template.jinja(name)
  end = '<end_of_turn>\n' if name == 'chat' else '<eos>'
  for role in ('assistant', 'model'):
    messages = [message('user', 'Hi'), message(role, 'Yes, {it} is')]
    asked = render(template, messages[:1])
    assert render(template, messages, False) == f'{asked}Yes, {{it}} is{end}'
  assert asked.startswith(render(template, messages[:1], False))


SYSTEM = message('system', ' Be brief. ')
CHAT = (
  '<bos><start_of_turn>user\n Be brief. \n\nHi<end_of_turn>\n'
  '<start_of_turn>model\nHello<end_of_turn>\n'
  '<start_of_turn>user\n<end_of_turn>\n<start_of_turn>model\n'
)


def test_turns_as_gemma_says_them():
  """System as it is and an empty line; all other text is trimmed."""
  template = chat_template.jinja('chat')
  turns = [message('user', ' Hi\n'), message('assistant', '\nHello '), message('user', '')]
  assert render(template, [SYSTEM, *turns]) == CHAT
  assert render(template, turns) == CHAT.replace(' Be brief. \n\n', '')
  empty = [message('system', ''), *turns]
  assert render(template, empty) == CHAT.replace(' Be brief. ', '')


@pytest.mark.parametrize('system', [[], [SYSTEM], [message('system', '')]])
def test_a_conversation_is_what_training_reads(system):
  turns = [
    message('user', ' Hi\n'),
    message('assistant', '\nHello '),
    message('user', 'And 서울?'),
    message('model', 'Yes'),
  ]
  for name in NAMES[:4]:
    messages = [*system, *(turns if name == 'chat' else turns[:2])]
    (record,) = data_toy.records([{'messages': messages}], name)
    end = '\n' if name == 'chat' else '<eos>'
    want = spelled(templates.render(name, record)) + end
    assert render(chat_template.jinja(name), messages, False) == want, name


def test_a_system_text_goes_before_a_single_question():
  got = render(chat_template.jinja('dolly'), [SYSTEM, message('user', 'Hi')])
  assert got == '<bos>Instruction:\n Be brief. \n\nHi\n\nResponse:\n'
  empty = [message('system', ''), message('user', 'Hi')]
  got = render(chat_template.jinja('plain'), empty)
  assert got == '<bos>Hi'


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize(
  'messages',
  [
    [message('assistant', 'a')],
    [message('user', 'a'), message('user', 'b')],
    [message('user', 'a'), message('tool', 'b')],
    [message('user', [{'type': 'image'}])],
  ],
)
def test_what_has_no_form_is_an_error(name, messages):
  with pytest.raises(Refused):
    render(chat_template.jinja(name), messages)


def test_single_questions_take_no_second_one():
  turns = [message('user', 'a'), message('model', 'b'), message('user', 'c')]
  render(chat_template.jinja('chat'), turns)
  for name in set(NAMES) - {'chat'}:
    with pytest.raises(Refused, match='one question'):
      render(chat_template.jinja(name), turns)
    with pytest.raises(Refused, match='one question'):
      render(chat_template.jinja(name), [])


def test_which_template_an_export_carries(caplog):
  tokenizer = data_toy.make_tokenizer()
  dolly, chat = map(chat_template.jinja, ('dolly', 'chat'))
  choose = chat_template.of_export
  assert choose('dolly', 'own', tokenizer) == dolly
  for own in ("{{ '<start_of_turn>user' }}", "{{ '<|turn>user' }}"):
    assert choose('chat', own, tokenizer) == own
  assert not caplog.records
  with caplog.at_level(logging.WARNING):
    for own in ("{{ '<|im_start|>user' }}", dolly):
      assert choose('chat', own, tokenizer) == chat
  assert 'no Gemma turns' in caplog.text
  assert choose(None, 'own', tokenizer) == 'own'
  assert choose('chat', None, tokenizer) == chat
  assert choose(None, None, tokenizer) == chat
  assert choose(None, None, None) is None
  with pytest.raises(ValueError, match='template: got'):
    chat_template.jinja('none_such')
