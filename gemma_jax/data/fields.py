"""The fields of a row: read under any of their names, checked, and counted.

    fields = Fields({'Instruction': 'Why?', 'output': 'So.', 'id': 7})
    fields.text('instruction')             'Why?'
    fields.answer('response', 'output')    'So.'
    fields.unread()                        ['id']

A name that some form reads is recognized in any letter case.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

ANSWER = ('response', 'output')
CONTEXT = ('context', 'input')

# Fields that are part of what a model is shown or has to say.
UNSAYABLE = (
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
_MEANT = (*CONTEXT, 'system', 'history', 'loss_mask')

_KNOWN = frozenset(
  (
    *ANSWER,
    *UNSAYABLE,
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


def kind(value: Any) -> str:
  """Describes a value in an error message: its type, and its text if that is short."""
  name = type(value).__name__
  if isinstance(value, str | list | dict) and len(value) > 40:
    return name
  text = repr(value)
  return f'{name} {text}' if len(text) <= 40 else name


class Fields:
  """The fields of a row, or of a message, that are not null.

  Attributes:
    asks: the answer may be still to come.
  """

  def __init__(self, row: Mapping[str, Any], prefix: str = '', asks: bool = False):
    self.asks = asks
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
    """A text that is to be learned; '' if it is still to come."""
    if self.asks and not self.optional_text(*names).strip():
      return ''
    return self.filled(*names)

  def filled(self, *names: str) -> str:
    """A text that must not be blank."""
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


def _is_null(value: Any) -> bool:
  return value is None or (isinstance(value, float) and math.isnan(value))
