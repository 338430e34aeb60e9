"""Examples in docstrings give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import gemma_jax

ROOT = Path(gemma_jax.__file__).parents[1]
NAMES = [
  '.'.join(path.relative_to(ROOT).with_suffix('').parts)
  for path in sorted((ROOT / 'gemma_jax').rglob('*.py'))
  if '>>> ' in path.read_text('utf-8')
]


def test_there_are_examples():
  assert len(NAMES) >= 7


@pytest.mark.parametrize('name', NAMES)
def test_examples(name):
  result = doctest.testmod(importlib.import_module(name))
  assert result.attempted and not result.failed
