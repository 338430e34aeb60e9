"""Helpers by which configs check themselves: name, got, expected, remedy."""

import dataclasses
import difflib
import re
from typing import Any


def require(ok: bool, name: str, got: Any, expected: str, remedy: str = ''):
  """Raises a ValueError with name, got, expected and remedy, unless ok."""
  if not ok:
    tail = f' {remedy}' if remedy else ''
    raise ValueError(f'{name}: got {got!r}, expected {expected}.{tail}')


def at_least(name: str, got: Any, low: int, remedy: str = ''):
  """Requires an integer >= low."""
  is_integer = isinstance(got, int) and not isinstance(got, bool)
  require(is_integer and got >= low, name, got, f'an integer >= {low}', remedy)


def seed(got: Any):
  """Requires a seed; beyond 32 bits, different ones would give the same random numbers."""
  is_integer = isinstance(got, int) and not isinstance(got, bool)
  require(is_integer and 0 <= got < 2**32, 'seed', got, 'an integer in [0, 2^32)')


def instance(name: str, got: Any, kind: Any, expected: str):
  """Requires an object of a type, or of one of several."""
  if not isinstance(got, kind):
    shown = repr(got) if isinstance(got, str) else type(got).__name__
    raise ValueError(f'{name}: got {shown}, expected {expected}.')


def choice(default: str, *choices: str) -> Any:
  """A dataclass field that takes one of some words, the default among them.

  They stand here alone: `check_choices` checks them, and `config.describe`
  shows them. (A `Literal` would be clearer, but `config_flags` cannot override
  a field of such a type from the command line.)
  """
  return dataclasses.field(default=default, metadata={'choices': choices})


def check_choices(config: Any, prefix: str, remedies: dict[str, str] | None = None):
  """Requires one of its words in every `choice` of a dataclass.

  Args:
    config: whose fields are checked; of a tuple, every value.
    prefix: in front of their names, e.g. 'model'.
    remedies: what to do about a value, by value.
  """
  for field in dataclasses.fields(config):
    choices = field.metadata.get('choices')
    if choices is None:
      continue
    value = getattr(config, field.name)
    for each in value if isinstance(value, tuple | list) else (value,):
      is_known = isinstance(each, str) and each in choices
      remedy = (remedies or {}).get(str(each), '')
      name = f'{prefix}.{field.name}'
      require(is_known, name, each, 'one of ' + ', '.join(choices), remedy)


def check_regex(name: str, pattern: Any):
  """Requires a regular expression."""
  require(isinstance(pattern, str), name, pattern, 'a regex')
  try:
    re.compile(pattern)
  except re.error as e:
    raise ValueError(f'{name}: {pattern!r} is not a regular expression ({e}).') from None


def field_paths(kind: Any, prefix: str = '') -> list[str]:
  """Fields of a dataclass and of those inside it: seed, model, model.path, ..."""
  paths = []
  for field in dataclasses.fields(kind):
    paths.append(prefix + field.name)
    if dataclasses.is_dataclass(field.type):
      paths += field_paths(field.type, f'{prefix}{field.name}.')
  return paths


def did_you_mean(name: str, paths: list[str]) -> str:
  """' Did you mean data.seq_len?' for a field's name; '' if none is spelt nearly so.

  Args:
    name: without groups, since the group may be what is wrong.
    paths: of all fields, from `field_paths`.
  """
  likeness = {
    path: difflib.SequenceMatcher(None, name, path.rpartition('.')[2]).ratio() for path in paths
  }
  best = max(likeness.values())
  nearest = ' or '.join(path for path in paths if likeness[path] == best)
  return f' Did you mean {nearest}?' if best > 0.68 else ''


class Freezable:
  """Mutable until `resolve` has checked it."""

  def __setattr__(self, name: str, value: Any):
    if '_is_frozen' in self.__dict__:
      raise dataclasses.FrozenInstanceError(
        f'{name}: a resolved config does not change; set it before resolve().'
      )
    fields = type(self).__annotations__
    if name not in fields:
      known = ', '.join(fields)
      raise AttributeError(
        f'{name}: no field of {type(self).__name__}, expected one of {known}.'
        f'{did_you_mean(name, field_paths(type(self)))}'
      )
    super().__setattr__(name, value)

  def freeze(self) -> None:
    """Makes it read-only."""
    self.__dict__['_is_frozen'] = True
