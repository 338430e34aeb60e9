"""The forms that a row may have, each read by one function into a `Record`.

    {"instruction", "response"}                  or "output" for "response"
    {"prompt", "response"}                       likewise
    {"messages": [{"role", "content", "weight"?}, ...]}
    {"tokens": [ids], "loss_mask": [0|1]?}
    {"en", "ko"}                                 for templates en_ko and ko_en

A text may come with a "context" (or "input"), a "system" text, a "history" of
[question, answer] pairs, and a "category". Known names are read in any case
("Context"), and a value that is null or NaN counts as missing. Messages are an
optional system message, then user and model (or assistant) in turns, ending with
a model; an answer of weight 0 is shown but not learned.

Nothing is dropped silently. Fields that change the text but that no template can
render are rejected (tools and their calls, reasoning, images), as are a row of two
forms at once and a known field where it has no meaning. The names of all other
fields go into `Record.unread`, to be counted and reported.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

from gemma_jax.data.record import MODEL, SYSTEM, USER, Record, Turn, make_key

FORMS = 'instruction+response, prompt+response, messages, tokens or en+ko'

_ROLES = {'system': SYSTEM, 'user': USER, 'model': MODEL, 'assistant': MODEL}

_ANSWER = ('response', 'output')
_CONTEXT = ('context', 'input')

# Fields that are part of what a model is shown or has to say.
_UNSAYABLE = (
  'tools',
  'functions',
  'tool_calls',
  'function_call',
  'reasoning',
  'reasoning_content',
  'thinking',
  'image',
  'images',
  'audio',
  'audios',
  'video',
  'videos',
)

# Fields that change what is shown or learned, wherever they appear.
_MEANT = (*_CONTEXT, 'system', 'history', 'loss_mask')

_KNOWN = frozenset(
  (
    *_ANSWER,
    *_UNSAYABLE,
    *_MEANT,
    'instruction',
    'prompt',
    'messages',
    'tokens',
    'en',
    'ko',
    'category',
    'weight',
    'role',
    'content',
  )
)


class BadRecord(ValueError):
  """Why a row cannot be used.

  Attributes:
    reason: the kind of defect, by which skipped rows are counted.
  """

  def __init__(self, reason: str, detail: str = ''):
    super().__init__(reason + detail)
    self.reason = reason


def parse(row: Any, template: str) -> Record:
  """Reads a row of any form.

  Args:
    row: a parsed JSON value.
    template: its name; it decides the direction of a pair of sentences.

  Raises:
    BadRecord: the row has none of the forms, or something in it cannot be read.
    ValueError: a pair of sentences with a template that does not translate.
  """
  if not isinstance(row, dict):
    raise BadRecord('not an object', f' (found: {kind(row)})')
  fields = _Fields(row)
  complete = [form for form in _FORMS if form.is_complete(fields)]
  if len(complete) > 1:
    raise BadRecord(
      f'two forms at once: {complete[0].name} and {complete[1].name}',
      f' (found: {", ".join(row)}); take the fields of one of them out',
    )
  begun = [f for f in _FORMS if any(map(fields.has, (*f.lead, *f.needs[0])))]
  form = next(iter(complete or begun), None)
  if form is None:
    raise fields.missing('instruction' if fields.has('response') else 'response')
  for group in form.needs:
    if not any(map(fields.has, group)):
      raise fields.missing(group[0])
  record = form.read(fields, template)
  if record.is_text:
    fields.refuse(_UNSAYABLE)
    fields.refuse_untaken(form.name)
  weight = fields.take('weight')
  if weight not in (None, 1):
    raise BadRecord(
      'field "weight" is not 1',
      f' (found: {kind(weight)}); records are not weighted: take it out, or give it another name',
    )
  category = fields.take('category')
  return dataclasses.replace(
    record,
    category='' if category is None else str(category),
    unread=(*record.unread, *fields.unread()),
  )


def kind(value: Any) -> str:
  """Describes a value in an error message: its type, and its text if that is short."""
  text = repr(value)
  name = type(value).__name__
  return f'{name} {text}' if len(text) <= 40 else name


class _Fields:
  """The fields of a row, or of a message, that are not null."""

  def __init__(self, row: Mapping[str, Any], prefix: str = ''):
    self._row = row
    self._prefix = prefix
    self._values: dict[str, Any] = {}
    self._spelled: dict[str, str] = {}
    self._taken: set[str] = set()
    for spelled, value in row.items():
      if _is_null(value):
        continue
      name = spelled.lower() if spelled.lower() in _KNOWN else spelled
      if name in self._values and self._values[name] != value:
        raise BadRecord(
          f'fields "{prefix}{self._spelled[name]}" and "{prefix}{spelled}" differ',
          '; take one of them out',
        )
      self._values[name] = value
      self._spelled[name] = spelled

  def has(self, name: str) -> bool:
    return name in self._values

  def take(self, *names: str) -> Any:
    """The value of a field that goes by several names; None if it is missing."""
    there = [name for name in names if self.has(name)]
    self._taken |= set(there)
    # An empty text next to another one is ignored.
    there = [n for n in there if self._values[n] != ''] or there[:1]
    for other in there[1:]:
      if self._values[other] != self._values[there[0]]:
        raise BadRecord(
          f'fields {self._quoted(there[0])} and {self._quoted(other)} differ',
          '; take one of them out',
        )
    return self._values[there[0]] if there else None

  def text(self, *names: str) -> str:
    """A field that must be there, a string, and valid Unicode."""
    value = self.take(*names)
    if value is None:
      raise self.missing(names[0])
    name = self._quoted(next(filter(self.has, names)))
    if not isinstance(value, str):
      raise BadRecord(f'field {name} is not a string', f' (found: {kind(value)})')
    try:
      value.encode()
    except UnicodeEncodeError as e:
      raise BadRecord(
        f'field {name} is not valid Unicode', f' (lone surrogate at character {e.start})'
      ) from None
    return value

  def optional_text(self, *names: str) -> str:
    """Like `text`, but '' if the field is missing."""
    return self.text(*names) if any(map(self.has, names)) else ''

  def answer(self, *names: str) -> str:
    """A text that is to be learned, which must not be blank."""
    text = self.text(*names)
    if not text.strip():
      name = self._quoted(next(filter(self.has, names)))
      raise BadRecord(f'field {name} is empty')
    return text

  def refuse(self, names: Sequence[str]) -> None:
    """Raises BadRecord if one of these fields holds anything."""
    for name in names:
      if self.take(name) not in (None, '', [], {}):
        raise BadRecord(
          f'field {self._quoted(name)} cannot be rendered by the templates',
          '; take it out, or write its content into the text',
        )

  def refuse_untaken(self, place: str) -> None:
    """Raises BadRecord if a field that is meant to change the text was not read."""
    for name in _MEANT:
      if name not in self._taken and self.take(name) not in (None, '', []):
        raise BadRecord(
          f'field {self._quoted(name)} is not read in {place}',
          '; take it out, or give it another name',
        )

  def missing(self, name: str) -> BadRecord:
    """The error for a field that is missing or null."""
    is_null = name in map(str.lower, self._row)
    return BadRecord(
      f'field "{self._prefix}{name}" is {"null" if is_null else "missing"}',
      f' (found: {", ".join(self._row) or "no field"})',
    )

  def unread(self) -> list[str]:
    """The fields that nothing has read, as they are spelled."""
    return [self._spelled[n] for n in self._values if n not in self._taken]

  def _quoted(self, name: str) -> str:
    return f'"{self._prefix}{self._spelled.get(name, name)}"'


def _read_tokens(fields: _Fields, template: str) -> Record:
  del template
  tokens, mask = fields.take('tokens'), fields.take('loss_mask')
  if (
    not isinstance(tokens, list)
    or not tokens
    or not all(type(t) is int and 0 <= t < 2**31 for t in tokens)
  ):
    raise BadRecord('field "tokens" is not a list of token ids', f' (found: {kind(tokens)})')
  if mask is not None:
    if not isinstance(mask, list) or not all(m in (0, 1) for m in mask):
      raise BadRecord('field "loss_mask" is not a list of 0 and 1', f' (found: {kind(mask)})')
    if len(mask) != len(tokens):
      raise BadRecord(
        'field "loss_mask" is not as long as "tokens"', f' (found: {len(mask)} and {len(tokens)})'
      )
  return Record(
    tokens=tuple(tokens),
    loss_mask=None if mask is None else tuple(map(int, mask)),
    key=make_key([tokens, mask]),
  )


def _read_messages(fields: _Fields, template: str) -> Record:
  del template
  messages = fields.take('messages')
  if not isinstance(messages, list) or not messages:
    raise BadRecord('field "messages" is not a list of messages', f' (found: {kind(messages)})')
  turns: list[Turn] = []
  parts: list[Any] = []  # of the key
  unread: dict[str, None] = {}
  for i, message in enumerate(messages):
    if not isinstance(message, dict):
      raise BadRecord(
        'field "messages" is not a list of messages', f' (found: {kind(message)} at {i})'
      )
    inner = _Fields(message, f'messages[{i}].')
    role = inner.text('role')
    turns.append(_message(inner, _ROLES.get(role, role)))
    inner.refuse_untaken('a message')
    parts.append([role, turns[-1].text])
    unread |= {f'messages[].{name}': None for name in inner.unread()}
  parts.pop()
  if system := fields.optional_text('system'):
    if turns[0].role == SYSTEM:
      raise BadRecord('field "system" beside a system message', '; take one of them out')
    turns.insert(0, Turn(SYSTEM, system))
    parts.insert(0, [SYSTEM, system])
  first_user = int(turns[0].role == SYSTEM)
  roles = [turn.role for turn in turns]
  if roles[first_user:] != [USER, MODEL] * max(len(roles) // 2, 1):
    raise BadRecord(
      'field "messages" must hold user and model (or assistant) in turns, '
      'from a user to a model, after at most one system message',
      f' (found: {", ".join(roles)})',
    )
  if context := fields.optional_text(*_CONTEXT):
    turns[first_user] = dataclasses.replace(turns[first_user], context=context)
    parts.append(context)
  return Record(turns=tuple(turns), key=make_key(parts), unread=tuple(unread))


def _message(fields: _Fields, role: str) -> Turn:
  """A message as a turn; the caller checks whether its role is in the right place."""
  fields.refuse(_UNSAYABLE)
  weight = fields.take('weight')
  if weight not in (None, 0, 1):
    raise BadRecord('a message has a weight other than 0 and 1', f' (found: {kind(weight)})')
  if role != MODEL and weight:
    raise BadRecord(
      f'a message of the role {role} has the weight 1',
      '; only answers are learned (data.loss_on=all learns every token)',
    )
  is_target = role == MODEL and weight != 0
  text = fields.answer('content') if is_target else fields.text('content')
  return Turn(role, text, is_target=is_target)


def _read_instruction(fields: _Fields, template: str) -> Record:
  del template
  question, answer = fields.text('instruction'), fields.answer(*_ANSWER)
  return _single(fields, question, answer, is_instruction=True)


def _read_prompt(fields: _Fields, template: str) -> Record:
  del template
  return _single(fields, fields.text('prompt'), fields.answer(*_ANSWER))


def _read_pair(fields: _Fields, template: str) -> Record:
  texts = {name: fields.answer(name) for name in ('en', 'ko')}
  if template not in ('en_ko', 'ko_en'):
    raise ValueError(
      f'data.template: got {template!r} for a pair en + ko, expected en_ko or '
      'ko_en. Set data.template=en_ko.'
    )
  source, target = template.split('_')
  record = _single(fields, texts[source], texts[target])
  # Both directions hold out the same pairs.
  return dataclasses.replace(record, key=make_key(list(texts.values())))


def _single(fields: _Fields, question: str, answer: str, is_instruction: bool = False) -> Record:
  """One question and its answer, preceded by system text and history."""
  before = []
  if system := fields.optional_text('system'):
    before.append(Turn(SYSTEM, system))
  before += _history(fields)
  context = fields.optional_text(*_CONTEXT)
  parts = [question, context, *([turn.role, turn.text] for turn in before)]
  return Record(
    turns=(*before, Turn(USER, question, context), Turn(MODEL, answer, is_target=True)),
    is_instruction=is_instruction,
    key=make_key(parts),
  )


def _history(fields: _Fields) -> list[Turn]:
  """Earlier turns; their answers are learned, like those in messages."""
  history = fields.take('history')
  if history in (None, ''):
    return []
  is_pairs = isinstance(history, list) and all(
    isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
    for pair in history
  )
  if not is_pairs:
    raise BadRecord(
      'field "history" is not a list of [question, answer] pairs', f' (found: {kind(history)})'
    )
  turns = []
  for i, pair in enumerate(history):
    inner = _Fields(dict(zip(('prompt', 'response'), pair, strict=True)), f'history[{i}].')
    turns.append(Turn(USER, inner.text('prompt')))
    turns.append(Turn(MODEL, inner.answer('response'), is_target=True))
  return turns


class _Form(NamedTuple):
  """A form of rows.

  Attributes:
    name: for messages.
    needs: what a complete row has: one field of each group.
    read: makes the record.
    lead: fields that mark a row as this form, besides the first group of `needs`.
  """

  name: str
  needs: tuple[tuple[str, ...], ...]
  read: Callable[[_Fields, str], Record]
  lead: tuple[str, ...] = ()

  def is_complete(self, fields: _Fields) -> bool:
    return all(any(map(fields.has, group)) for group in self.needs)


_FORMS = (
  _Form('tokens', (('tokens',),), _read_tokens),
  _Form('messages', (('messages',),), _read_messages),
  _Form('instruction+response', (('instruction',), _ANSWER), _read_instruction),
  _Form('prompt+response', (('prompt',), _ANSWER), _read_prompt),
  _Form('en+ko', (('en',), ('ko',)), _read_pair, lead=('ko',)),
)


def _is_null(value: Any) -> bool:
  return value is None or (isinstance(value, float) and math.isnan(value))
