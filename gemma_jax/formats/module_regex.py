"""Matches the regexes of an adapter's file against names of modules, in bounded time.

`re` tries one way through a regex after another, of which `(\\w+)+x` has 2^n in a name
of n characters. Here each part of a regex takes the set of positions where it may begin
to the set of those where it may end: two ways to one position are followed once. What a
character is, and where a word ends, is left to `re`.
"""

from collections.abc import Collection
import functools
import re
from re import _compiler, _constants, _parser  # pyright: ignore[reportAttributeAccessIssue]: not in its stubs
from typing import Any

MOST_CHARACTERS = 1 << 14
_MOST_STEPS = 1 << 23  # some seconds; a regex of several `.*` takes a thousand for a name

# Without these there is only one way through a regex.
_BRANCHING = frozenset('|*+?{')
# Parts that `re` matches by themselves: a character, or a place between two.
_SINGLE = frozenset(
  getattr(_constants, name) for name in ('LITERAL', 'NOT_LITERAL', 'ANY', 'IN', 'AT')
)
_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT)
_ASSERTS = (_constants.ASSERT, _constants.ASSERT_NOT)


def is_regex(pattern: Any) -> bool:
  """Whether it is a regex that can be matched here."""
  if not isinstance(pattern, str) or len(pattern) > MOST_CHARACTERS:
    return False
  try:
    re.compile(pattern)
    return _is_known(_parser.parse(pattern))
  except (re.error, OverflowError, RecursionError):
    return False


def _is_known(parts: Any) -> bool:
  """Whether all parts are of those below; not so backreferences and possessive repeats."""
  for op, value in parts:
    if op in _SINGLE:
      continue
    if op is _constants.BRANCH:
      inner = value[1]
    elif op is _constants.SUBPATTERN and not value[1] and not value[2]:
      inner = [value[3]]
    elif op in _REPEATS:
      inner = [value[2]]
    elif op in _ASSERTS:
      inner = [value[1]]
    else:
      return False
    if not all(map(_is_known, inner)):
      return False
  return True


class Matcher:
  """Matches names, and gives up after a bounded amount of work for all of them."""

  def __init__(self):
    self._left = _MOST_STEPS
    self._singles: dict[Any, re.Pattern[str]] = {}

  def matches(self, pattern: str, name: str, starts: Collection[int] = (0,)) -> bool:
    """Whether the name, from one of these positions on, is what the regex describes.

    Raises:
      ValueError: there is no telling in bounded time.
    """
    if _BRANCHING.isdisjoint(pattern):
      compiled = _compiled(pattern)
      return any(compiled.fullmatch(name, i) for i in starts)
    try:
      return len(name) in self._ends(_parsed(pattern), name, set(starts))
    except (_TooMuch, RecursionError):
      raise ValueError(f'regex {pattern[:80]!r} is too complex, expected a simpler one') from None

  def _ends(self, parts: Any, name: str, starts: set[int]) -> set[int]:
    """Where a sequence of parts may end."""
    self._left -= 1
    for op, value in parts:
      self._left -= len(starts)
      if self._left < 0:
        raise _TooMuch
      if op is _constants.BRANCH:
        starts = set().union(*(self._ends(each, name, starts) for each in value[1]))
      elif op is _constants.SUBPATTERN:
        starts = self._ends(value[3], name, starts)
      elif op in _REPEATS:
        least, most, each = value
        starts = self._repeat(least, most, each, name, starts)
      elif op in _ASSERTS:
        (direction, each), wanted = value, op is _constants.ASSERT
        starts = {i for i in starts if self._looks(direction, each, name, i) is wanted}
      else:
        one = self._single(op, value, parts.state)
        starts = {match.end() for i in starts if (match := one.match(name, i))}
    return starts

  def _repeat(self, least: int, most: int, parts: Any, name: str, starts: set[int]) -> set[int]:
    # Of more repetitions than there are characters, some are empty and so may be any.
    for _ in range(min(least, len(name) + 1)):
      starts = self._ends(parts, name, starts)
    reached = new = starts
    for _ in range(most - least):
      new = self._ends(parts, name, new) - reached
      if not new:
        break
      reached = reached | new
    return reached

  def _looks(self, direction: int, parts: Any, name: str, i: int) -> bool:
    """Whether the parts are ahead of a position, or behind it."""
    if direction > 0:
      return bool(self._ends(parts, name, {i}))
    width, _ = parts.getwidth()  # `re` has only fixed ones
    return width <= i and i in self._ends(parts, name, {i - width})

  def _single(self, op: Any, value: Any, state: Any) -> re.Pattern[str]:
    """The regex of one part; there are few different ones."""
    key = op, str(value), state.flags
    if key not in self._singles:
      self._singles[key] = _compiler.compile(_parser.SubPattern(state, [(op, value)]))
    return self._singles[key]


class _TooMuch(Exception):
  pass


@functools.lru_cache(1 << 12)
def _compiled(pattern: str) -> re.Pattern[str]:
  return re.compile(pattern)


@functools.lru_cache(1 << 6)
def _parsed(pattern: str) -> Any:
  return _parser.parse(pattern)
