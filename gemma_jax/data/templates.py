"""Records to spans: which text a model reads, and which it must produce.

A template turns a `Record` into a list of `Span`s. Training renders the whole
record; generation renders one that still lacks its answer, with the same
function, so the two cannot drift apart.

    template 'dolly', a record of the turns user 'Hi' and model 'Hello'
    Span('Instruction:\nHi\n\nResponse:\n')
    Span('Hello', is_answer=True, is_target=True)

    template 'chat', the same record
    Span('<start_of_turn>', is_control=True)
    Span('user\nHi')
    Span('<end_of_turn>', is_control=True)
    Span('\n')
    Span('<start_of_turn>', is_control=True)
    Span('model\n')
    Span('Hello', is_answer=True, is_target=True)
    Span('<end_of_turn>', is_control=True, is_answer=True, is_target=True)

BOS and EOS are added in `encoding`.
"""

from collections.abc import Callable
import dataclasses
import functools

from gemma_jax.data import tokenizer as tokenizer_lib
from gemma_jax.data.record import MODEL, Record, Turn

# Templates that say by themselves what to do.
TRANSLATIONS = ('en_ko', 'ko_en')

# The first character of a part of a text, and one past its last.
Range = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Span:
  """A piece of a document.

  Attributes:
    text: plain text, or the name of a control token.
    is_control: `text` is a control token, to be inserted by its id.
    is_answer: a model says it.
    is_target: the model learns to produce it.
    spare: the characters that may be cut if the row is too short.
    last_spare: those that may be cut too, once `spare` is used up.
  """

  text: str
  is_control: bool = False
  is_answer: bool = False
  is_target: bool = False
  spare: tuple[Range, ...] = dataclasses.field(default=(), compare=False)
  last_spare: tuple[Range, ...] = dataclasses.field(default=(), compare=False)


def render(template: str, record: Record) -> list[Span]:
  """The spans of a text record.

  Raises:
    ValueError: unknown template, or one that cannot hold this record.
  """
  return _template(template)(record)


def check_name(template: str):
  """Raises a ValueError that lists the templates if there is none of this name."""
  _template(template)


def _single(
  record: Record, *, name: str, before: str, context: str | None, after: str
) -> list[Span]:
  """One question and its answer.

  Args:
    record: has no earlier turns.
    name: of the template.
    before: the text before the question.
    context: before the context, if there is one; None joins the two as
      paragraphs.
    after: before the answer.
  """
  question, *answers = record.dialogue
  if len(answers) > 1:
    raise ValueError(
      f'data.template: got {name!r} for a conversation of '
      f'{len(record.dialogue)} turns, expected chat (the others hold one '
      'question and one answer). Set data.template=chat.'
    )
  if name in TRANSLATIONS and (record.system or record.context):
    raise ValueError(
      f'data.template: got {name!r} for a record with a system text or a '
      'context, expected only a sentence: they would be translated with it. '
      'Take them out.'
    )
  text = _Text(record.is_instruction)
  text.add(before)
  if record.system:
    text.add(f'{record.system}\n\n')
  text.ask(question, context)
  text.add(after)
  return [text.span(), *_answers(answers)]


def _chat(record: Record) -> list[Span]:
  """Gemma's turns.

  As in the released chat template: the system's text comes before the first
  user's, unchanged, with an empty line between them, and every other text is
  stripped.
  """
  start = Span(tokenizer_lib.START_OF_TURN, is_control=True)
  end = Span(tokenizer_lib.END_OF_TURN, is_control=True)
  spans: list[Span] = []
  for i, turn in enumerate(record.dialogue):
    if turn.role == MODEL:
      is_target = turn.is_target
      spans += _answers([dataclasses.replace(turn, text=turn.text.strip())])
      spans.append(dataclasses.replace(end, is_answer=True, is_target=is_target))
      continue
    if i:
      spans.append(Span('\n'))
    text = _Text(record.is_instruction)
    text.add('user\n')
    if not i and record.system is not None:
      text.add(f'{record.system}\n\n')
    text.ask(turn, None, strip=True)
    spans += [start, text.span(), end, Span('\n'), start, Span('model\n')]
  return spans


class _Text:
  """The text of a prompt, and which of its characters may be cut."""

  def __init__(self, is_instruction: bool):
    self._is_instruction = is_instruction
    self._text = ''
    self._spare: list[Range] = []
    self._last_spare: list[Range] = []

  def add(self, text: str) -> None:
    """Adds text that stays."""
    self._text += text

  def ask(self, turn: Turn, before: str | None, strip: bool = False) -> None:
    """Adds a question and its context.

    Args:
      turn: the user's.
      before: text before the context; None is an empty line, if there is a
        question to separate it from.
      strip: whether to strip white space at both ends.
    """
    if before is None:
      before = '\n\n' if turn.text else ''
    text = turn.text + (before + turn.context if turn.context else '')
    asked = (0, len(turn.text))
    about = (len(text) - len(turn.context), len(text))
    start = len(self._text)
    if strip:
      start -= len(text) - len(text.lstrip())
      text = text.strip()
    self._text += text
    # What a question is about is cut first.
    self._spare += self._placed(about, start)
    last = self._last_spare if self._is_instruction else self._spare
    last += self._placed(asked, start)

  def _placed(self, part: Range, start: int) -> list[Range]:
    """A range of a text that begins at `start`, without what was stripped."""
    first = max(part[0] + start, 0)
    last = min(part[1] + start, len(self._text))
    return [(first, last)] if first < last else []

  def span(self) -> Span:
    return Span(self._text, spare=tuple(self._spare), last_spare=tuple(self._last_spare))


def _answers(turns: list[Turn]) -> list[Span]:
  return [Span(turn.text, is_answer=True, is_target=turn.is_target) for turn in turns]


_TEMPLATES: dict[str, Callable[[Record], list[Span]]] = {
  'dolly': functools.partial(
    _single,
    name='dolly',
    before='Instruction:\n',
    context='\n\nContext:\n',
    after='\n\nResponse:\n',
  ),
  'chat': _chat,
  'plain': functools.partial(_single, name='plain', before='', context=None, after=''),
  'korean': functools.partial(
    _single, name='korean', before='질문:\n', context='\n\n맥락:\n', after='\n\n답변:\n'
  ),
  'en_ko': functools.partial(
    _single,
    name='en_ko',
    before='Translate English to Korean.\n\nEnglish:\n',
    context=None,
    after='\n\nKorean:\n',
  ),
  'ko_en': functools.partial(
    _single,
    name='ko_en',
    before='Translate Korean to English.\n\nKorean:\n',
    context=None,
    after='\n\nEnglish:\n',
  ),
}


def _template(name: str) -> Callable[[Record], list[Span]]:
  if name not in _TEMPLATES:
    raise ValueError(f'data.template: got {name!r}, expected one of {", ".join(_TEMPLATES)}.')
  return _TEMPLATES[name]
