"""Errors say name, got, expected and remedy in one line."""

import dataclasses

import pytest

from gemma_jax.config import checks
from gemma_jax.config.train import TrainConfig


@dataclasses.dataclass
class Words:
  one: str = checks.choice('x', 'x', 'y')
  several: tuple = dataclasses.field(default=(), metadata={'choices': ('x', 'y')})
  free: str = 'anything'


@pytest.mark.parametrize(
  ('check', 'arguments', 'message'),
  [
    (
      checks.require,
      (False, 'a.b', 3, 'a dog', 'Buy one.'),
      'a.b: got 3, expected a dog. Buy one.',
    ),
    (checks.at_least, ('a', 1, 2), 'a: got 1, expected an integer >= 2.'),
    (checks.at_least, ('a', True, 0), 'a: got True, expected an integer >= 0.'),
    (checks.check_choices, (Words(one='z'), 'a'), "a.one: got 'z', expected one of x, y."),
    (
      checks.check_choices,
      (Words(several=('x', 3)), 'a'),
      'a.several: got 3, expected one of x, y.',
    ),
    (
      checks.check_choices,
      (Words(one='z'), 'a', {'z': 'Zs are out.'}),
      "a.one: got 'z', expected one of x, y. Zs are out.",
    ),
    (checks.check_regex, ('a', 3), 'a: got 3, expected a regex.'),
    (
      checks.check_regex,
      ('a', '('),
      "a: '(' is not a regular expression (missing ), unterminated subpattern at position 0).",
    ),
  ],
)
def test_messages(check, arguments, message):
  with pytest.raises(ValueError) as caught:
    check(*arguments)
  assert str(caught.value) == message


def test_what_is_right_passes():
  checks.require(True, 'a', 1, 'anything')
  checks.at_least('a', 2, 2)
  checks.check_choices(Words(one='y', several=('x', 'y')), 'a')
  checks.check_regex('a', 'layer_[0-9]+')


def test_frozen_is_frozen():
  @dataclasses.dataclass
  class Part(checks.Freezable):
    size: int = 3

  part = Part()
  part.size = 5
  part.__dict__['_is_frozen'] = True
  with pytest.raises(dataclasses.FrozenInstanceError, match='size'):
    part.size = 7
  assert part.size == 5


def test_a_field_that_is_not_there_cannot_be_set():
  config = TrainConfig()
  with pytest.raises(AttributeError, match=r'stpes: no field of TrainConfig, expected .*steps'):
    config.stpes = 5
  with pytest.raises(AttributeError, match='rnak: no field of LoraConfig, expected one of rank'):
    config.lora.rnak = 5
  with pytest.raises(AttributeError, match=r'data\. Did you mean data\.global_batch_size\?$'):
    config.global_batch_size = 5
