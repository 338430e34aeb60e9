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
from typing import Any, NamedTuple

from absl import logging

from gemma_jax.data.fields import ANSWER, CONTEXT, UNSAYABLE, BadRecord, Fields, kind
from gemma_jax.data.record import MODEL, SYSTEM, USER, Record, Turn, asking, make_key

FORMS = 'instruction+response, prompt+response, messages, tokens or en+ko'

# What a model may be asked.
Question = str | Mapping[str, Any] | Sequence[Mapping[str, Any]] | Record

_ROLES = {'system': SYSTEM, 'user': USER, 'model': MODEL, 'assistant': MODEL}


def parse(row: Any, template: str, asks: bool = False) -> Record:
  """Reads a row of any form.

  Args:
    row: a parsed JSON value.
    template: its name; it decides the direction of a pair of sentences.
    asks: the row is a question: its last answer may be missing, and is not kept.

  Raises:
    BadRecord: the row has none of the forms, or something in it cannot be read.
    ValueError: a pair of sentences with a template that does not translate.
  """
  if not isinstance(row, dict):
    raise BadRecord('not an object', f' (found: {kind(row)})')
  fields = Fields(row, asks=asks)
  complete = [form for form in _FORMS if form.is_complete(fields)]
  begun = [f for f in _FORMS if any(map(fields.has, (*f.lead, *f.needs[0])))]
  # A question is complete without its answer.
  rivals = complete or begun if asks else complete
  if len(rivals) > 1:
    raise BadRecord(
      f'two forms at once: {rivals[0].name} and {rivals[1].name}',
      f' (found: {", ".join(row)}); take the fields of one of them out',
    )
  form = next(iter(complete or begun), None)
  if form is None:
    raise fields.missing('instruction' if asks or fields.has('response') else 'response')
  for group in () if asks else form.needs:
    if not any(map(fields.has, group)):
      raise fields.missing(group[0])
  record = form.read(fields, template)
  if record.is_text:
    fields.refuse(UNSAYABLE)
    fields.refuse_untaken(form.name)
  weight = fields.take('weight')
  if weight not in (None, 1):
    raise BadRecord(
      'field "weight" is not 1',
      f' (found: {kind(weight)}); records are not weighted: take it out, or give it another name',
    )
  category = fields.take('category')
  record = dataclasses.replace(
    record,
    category='' if category is None else str(category),
    unread=(*record.unread, *fields.unread()),
  )
  return record.unanswered() if asks else record


def question(asked: Question, template: str, name: str = 'prompt') -> Record:
  """A question of any form, as a record that waits for its answer.

      'Why?'
      {'instruction': 'Why?', 'context': 'Once.'}
      [{'role': 'user', 'content': 'Why?'}, {'role': 'model', 'content': 'So.'},
       {'role': 'user', 'content': 'Really?'}]

  Args:
    asked: a text, a row of any form or its messages; of a row or a `Record` that
      has an answer already, the last one is left out.
    template: its name; it decides the direction of a pair of sentences.
    name: of the question, for error messages.

  Raises:
    ValueError: it has none of the forms, or something in it cannot be read.
  """
  if isinstance(asked, str):
    return asking(asked)
  if isinstance(asked, Record):
    return asked.unanswered()
  row = dict(asked) if isinstance(asked, Mapping) else {'messages': asked}
  try:
    record = parse(row, template, asks=True)
  except BadRecord as e:
    raise ValueError(
      f'{name}: {e}. Expected a text, messages, or a record of {FORMS}, '
      'which needs no response to be asked.'
    ) from None
  if record.unread:
    logging.warning('%s has fields that nothing reads: %s', name, ', '.join(record.unread))
  return record


def _read_tokens(fields: Fields, template: str) -> Record:
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


def _read_messages(fields: Fields, template: str) -> Record:
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
    inner = Fields(message, f'messages[{i}].')
    role = inner.text('role')
    turns.append(_message(inner, _ROLES.get(role, role)))
    inner.refuse_untaken('a message')
    parts.append([role, turns[-1].text])
    unread |= {f'messages[].{name}': None for name in inner.unread()}
  if turns[-1].role == MODEL:
    parts.pop()
  if system := fields.optional_text('system'):
    if turns[0].role == SYSTEM:
      raise BadRecord('field "system" beside a system message', '; take one of them out')
    turns.insert(0, Turn(SYSTEM, system))
    parts.insert(0, [SYSTEM, system])
  first_user = int(turns[0].role == SYSTEM)
  roles = [turn.role for turn in turns]
  if fields.asks and roles[-1] == USER:
    roles.append(MODEL)  # the answer that is still to come
  if roles[first_user:] != [USER, MODEL] * max(len(roles) // 2, 1):
    raise BadRecord(
      'field "messages" must hold user and model (or assistant) in turns, '
      f'from a user to a {"user" if fields.asks else "model"}, after at most one system message',
      f' (found: {", ".join(roles)})',
    )
  if context := fields.optional_text(*CONTEXT):
    turns[first_user] = dataclasses.replace(turns[first_user], context=context)
    parts.append(context)
  return Record(turns=tuple(turns), key=make_key(parts), unread=tuple(unread))


def _message(fields: Fields, role: str) -> Turn:
  """A message as a turn; the caller checks whether its role is in the right place."""
  fields.refuse(UNSAYABLE)
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


def _read_instruction(fields: Fields, template: str) -> Record:
  del template
  question, answer = fields.text('instruction'), fields.answer(*ANSWER)
  return _single(fields, question, answer, is_instruction=True)


def _read_prompt(fields: Fields, template: str) -> Record:
  del template
  return _single(fields, fields.text('prompt'), fields.answer(*ANSWER))


def _read_pair(fields: Fields, template: str) -> Record:
  texts = {name: fields.answer(name) for name in ('en', 'ko')}
  if template not in ('en_ko', 'ko_en'):
    raise ValueError(
      f'data.template: got {template!r} for a pair en + ko, expected en_ko or '
      'ko_en. Set data.template=en_ko.'
    )
  source, target = template.split('_')
  record = _single(fields, fields.filled(source), texts[target])
  # Both directions hold out the same pairs.
  return dataclasses.replace(record, key=make_key(list(texts.values())))


def _single(fields: Fields, question: str, answer: str, is_instruction: bool = False) -> Record:
  """One question and its answer, preceded by system text and history."""
  before = []
  if system := fields.optional_text('system'):
    before.append(Turn(SYSTEM, system))
  before += _history(fields)
  context = fields.optional_text(*CONTEXT)
  parts = [question, context, *([turn.role, turn.text] for turn in before)]
  return Record(
    turns=(*before, Turn(USER, question, context), Turn(MODEL, answer, is_target=True)),
    is_instruction=is_instruction,
    key=make_key(parts),
  )


def _history(fields: Fields) -> list[Turn]:
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
    inner = Fields(dict(zip(('prompt', 'response'), pair, strict=True)), f'history[{i}].')
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
  read: Callable[[Fields, str], Record]
  lead: tuple[str, ...] = ()

  def is_complete(self, fields: Fields) -> bool:
    return all(any(map(fields.has, group)) for group in self.needs)


_FORMS = (
  _Form('tokens', (('tokens',),), _read_tokens),
  _Form('messages', (('messages',),), _read_messages),
  _Form('instruction+response', (('instruction',), ANSWER), _read_instruction),
  _Form('prompt+response', (('prompt',), ANSWER), _read_prompt),
  _Form('en+ko', (('en',), ('ko',)), _read_pair, lead=('ko',)),
)
