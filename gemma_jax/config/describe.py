"""The fields of a config as text: name, default, choices, meaning.

What a field means stands in the docstring of its class, and which words it
takes in its `choice`; nothing is said here a second time.
"""

from collections.abc import Iterator
import dataclasses
import inspect
import re
import textwrap
from typing import Any

_WIDTH = 88


def describe(config: Any, prefix: str = 'config') -> str:
  """A block for every field of a config and of the configs in it.

      --config.lora.rank=8
          r.
      --config.lora.scale_rule=alpha_over_r   (constant, alpha_over_r, alpha_over_sqrt_r)
          constant (scale = alpha), alpha_over_r (the paper) or ...

  Args:
    config: a dataclass whose docstring has a section `Attributes`.
    prefix: in front of the names.
  """
  return '\n'.join(_blocks(config, prefix))


def _blocks(config: Any, prefix: str) -> Iterator[str]:
  meanings, nested = _attributes(type(config)), []
  for field in dataclasses.fields(config):
    value, name = getattr(config, field.name), f'{prefix}.{field.name}'
    if dataclasses.is_dataclass(value):
      nested.append((value, name))
      continue
    head = f'--{name}={value}'
    if choices := field.metadata.get('choices'):
      head += f'   ({", ".join(choices)})'
    indent = ' ' * 4
    yield (
      head
      + '\n'
      + textwrap.fill(meanings[field.name], _WIDTH, initial_indent=indent, subsequent_indent=indent)
    )
  for value, name in nested:
    yield from _blocks(value, name)


def _attributes(cls: type) -> dict[str, str]:
  """Field → what the docstring's section `Attributes` says of it."""
  _, _, section = (inspect.getdoc(cls) or '').partition('Attributes:\n')
  entries = re.split(r'^  (\w+): ', section, flags=re.MULTILINE)[1:]
  texts = [' '.join(text.split()) for text in entries[1::2]]
  return dict(zip(entries[::2], texts, strict=True))
