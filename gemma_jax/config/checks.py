"""Helpers by which configs check themselves: name, got, expected, remedy."""

import dataclasses
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


def one_of(name: str, got: Any, choices: tuple[str, ...]):
  """Requires one of the choices."""
  require(got in choices, name, got, 'one of ' + ', '.join(choices))


def check_regex(name: str, pattern: Any):
  """Requires a regular expression."""
  require(isinstance(pattern, str), name, pattern, 'a regex')
  try:
    re.compile(pattern)
  except re.error as e:
    raise ValueError(f'{name}: {pattern!r} is not a regular expression ({e}).') from None


class Freezable:
  """Mutable until `resolve` has checked it."""

  def __setattr__(self, name: str, value: Any):
    if '_is_frozen' in self.__dict__:
      raise dataclasses.FrozenInstanceError(
        f'{name}: a resolved config does not change; set it before resolve().'
      )
    super().__setattr__(name, value)

  def freeze(self) -> None:
    """Makes it read-only."""
    self.__dict__['_is_frozen'] = True
