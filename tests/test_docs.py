"""Docstrings: their examples give what they say, and pages are made of them."""

import doctest
import importlib
import os
from pathlib import Path
import re
import subprocess
import sys

import pytest

import gemma_jax

ROOT = Path(__file__).parents[1]
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


def test_pages_are_made_without_a_warning(tmp_path):
  """By the command of CONTRIBUTING.md; every door stands on the first page."""
  text = (ROOT / 'CONTRIBUTING.md').read_text('utf-8')
  (command,) = re.findall(r'^\.venv/bin/python (-m pdoc .*)$', text, re.M)
  command = command.replace('DIR', str(tmp_path))
  ran = subprocess.run(
    ['bash', '-c', f'{sys.executable} {command}'],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert ran.returncode == 0, ran.stderr
  assert 'Warn' not in ran.stderr
  page = (tmp_path / 'gemma_jax.html').read_text('utf-8')
  for name in set(gemma_jax.__all__):
    assert f'id="{name}"' in page, name
  assert (tmp_path / 'gemma_jax' / 'lora' / 'spectrum.html').is_file()
