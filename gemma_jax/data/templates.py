"""Records to spans: which text a model reads, and which it must produce.

A template turns a `Conversation` into a list of `Span`s. Training renders the
whole conversation; generation renders one that still waits for its answer, with
the same function, so the two cannot drift apart.

    template 'dolly', {'instruction': 'Hi', 'response': 'Hello'}
    Span('Instruction:\nHi\n\nResponse:\n')
    Span('Hello', is_target=True)

    template 'chat', the same record
    Span('<start_of_turn>', is_control=True)
    Span('user\nHi')
    Span('<end_of_turn>', is_control=True)
    Span('\n')
    Span('<start_of_turn>', is_control=True)
    Span('model\n')
    Span('Hello', is_target=True)
    Span('<end_of_turn>', is_control=True, is_target=True)

BOS and EOS are added in `examples`.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from gemma_jax.data import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True)
class Span:
  """A piece of a document.

  Attributes:
    text: plain text, or the name of a control token.
    is_control: `text` is a control token, to be inserted by its id.
    is_target: the model learns to produce it.
  """

  text: str
  is_control: bool = False
  is_target: bool = False


@dataclasses.dataclass(frozen=True)
class Conversation:
  """What every text record comes down to.

  Attributes:
    turns: user, model, user, model, ...; an odd number waits for an answer.
    system: what holds for all turns; may be empty.
    context: a text that the first user turn is about; may be empty.
  """

  turns: tuple[str, ...]
  system: str = ''
  context: str = ''


def conversation(record: Mapping[str, Any], template: str) -> Conversation:
  """Brings a text record of any form into one.

      {instruction, context, response}  turns (instruction, response), context
      {prompt, response}                turns (prompt, response)
      {messages: [system, user, model]} turns (user, model), system
      {en, ko}                          turns (en, ko) for en_ko, else (ko, en)

  Args:
    record: a record that `records.check_record` accepts.
    template: its name; it decides the direction of a pair of sentences.

  Raises:
    ValueError: a pair of sentences with a template that is no translation.
  """
  if 'messages' in record:
    messages = record['messages']
    system = messages[0]['content'] if messages[0]['role'] == 'system' else ''
    turns = tuple(m['content'] for m in messages if m['role'] != 'system')
    return Conversation(turns, system=system)
  if 'instruction' in record:
    return Conversation(
      (record['instruction'], record['response']),
      context=record.get('context') or '',
    )
  if 'prompt' in record:
    return Conversation((record['prompt'], record['response']))
  if template not in ('en_ko', 'ko_en'):
    raise ValueError(
      f'data.template: got {template!r} for a pair en + ko, expected en_ko or '
      'ko_en. Set --config.data.template.'
    )
  source, target = template.split('_')
  return Conversation((record[source], record[target]))


def render(template: str, record: Mapping[str, Any]) -> list[Span]:
  """The spans of a text record; the last ones are targets.

  Raises:
    ValueError: unknown template, or one that cannot hold this record.
  """
  return _template(template)(conversation(record, template))


def render_prompt(template: str, prompt: str) -> list[Span]:
  """The spans before the response, for generation; none is a target."""
  return _template(template)(Conversation((prompt,)))


def check_name(template: str):
  """Raises a ValueError that lists the templates if there is none so named."""
  _template(template)


def _dolly(chat: Conversation) -> list[Span]:
  context = f'\n\nContext:\n{chat.context}' if chat.context else ''
  question = _join(chat.system, chat.turns[0])
  return _single(
    'dolly', chat, f'Instruction:\n{question}{context}\n\nResponse:\n'
  )


def _korean(chat: Conversation) -> list[Span]:
  context = f'\n\n맥락:\n{chat.context}' if chat.context else ''
  question = _join(chat.system, chat.turns[0])
  return _single('korean', chat, f'질문:\n{question}{context}\n\n답변:\n')


def _plain(chat: Conversation) -> list[Span]:
  return _single('plain', chat, _first_turn(chat))


def _en_ko(chat: Conversation) -> list[Span]:
  source = _first_turn(chat)
  return _single(
    'en_ko',
    chat,
    f'Translate English to Korean.\n\nEnglish:\n{source}\n\nKorean:\n',
  )


def _ko_en(chat: Conversation) -> list[Span]:
  source = _first_turn(chat)
  return _single(
    'ko_en',
    chat,
    f'Translate Korean to English.\n\nKorean:\n{source}\n\nEnglish:\n',
  )


def _chat(chat: Conversation) -> list[Span]:
  """Gemma's turns; text is stripped as the released chat template does."""
  start = Span(tokenizer_lib.START_OF_TURN, is_control=True)
  end = Span(tokenizer_lib.END_OF_TURN, is_control=True)
  users = (_first_turn(chat), *chat.turns[2::2])
  models = chat.turns[1::2]
  spans = []
  for i, user in enumerate(users):
    if i:
      spans.append(Span('\n'))
    spans += [start, Span(f'user\n{user.strip()}'), end]
    spans += [Span('\n'), start, Span('model\n')]
    if i < len(models):
      spans.append(Span(models[i].strip(), is_target=True))
      spans.append(dataclasses.replace(end, is_target=True))
  return spans


_TEMPLATES = {
  'dolly': _dolly,
  'chat': _chat,
  'plain': _plain,
  'korean': _korean,
  'en_ko': _en_ko,
  'ko_en': _ko_en,
}


def _template(name: str):
  if name not in _TEMPLATES:
    raise ValueError(
      f'data.template: got {name!r}, expected one of {", ".join(_TEMPLATES)}.'
    )
  return _TEMPLATES[name]


def _single(name: str, chat: Conversation, prompt: str) -> list[Span]:
  """A prompt, and its response where there is one."""
  if len(chat.turns) > 2:
    raise ValueError(
      f'data.template: got {name!r} for a conversation of {len(chat.turns)} '
      'turns, expected chat (the others hold one question and one answer). '
      'Set --config.data.template=chat.'
    )
  return [Span(prompt)] + [Span(t, is_target=True) for t in chat.turns[1:]]


def _first_turn(chat: Conversation) -> str:
  return _join(chat.system, chat.turns[0], chat.context)


def _join(*texts: str) -> str:
  return '\n\n'.join(text for text in texts if text)
