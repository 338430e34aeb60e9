"""What the scripts install: the lock has all of it, and pip checks the hashes."""

import ast
import os
from pathlib import Path
import re
import subprocess

from packaging.requirements import Requirement
import pytest

ROOT = Path(__file__).parents[2]

# Stands for a venv's Python: keeps the arguments, and of a file how many it pins.
PYTHON = """#!/bin/bash
[ "$3" = --version ] && exit
shift 3
for last; do :; done
case $last in /dev/*) pins=" $(grep -c == "$last")" ;; esac
echo "$*$pins" >> "$CALLS"
"""


def shell(program, **environment):
  return subprocess.run(
    ['bash', '-euo', 'pipefail', '-c', f'. launch/environment.sh; {program}'],
    cwd=ROOT,
    env={**os.environ, **environment},
    check=True,
    capture_output=True,
    text=True,
  ).stdout


def pins(part):
  """Requirements of a part of the lock, each with how many hashes."""
  text = shell(f'locked {part}').replace('\\\n', ' ')
  rows = [line.split(' --hash=sha256:') for line in text.splitlines() if line[0] != '#']
  return [(Requirement(row[0]), len(row) - 1) for row in rows]


def wanted():
  """The requirements in setup.py, by extra; '' has those of the package."""
  tree = ast.parse((ROOT / 'setup.py').read_text('utf-8'))
  values = {x.targets[0].id: x.value for x in tree.body if isinstance(x, ast.Assign)}
  return {'': ast.literal_eval(values['REQUIRED'])} | ast.literal_eval(values['EXTRAS'])


@pytest.mark.parametrize(
  ('part', 'extras'), [('quickstart', ['gemma3-270m']), ('all', ['gemma3-270m', 'test'])]
)
@pytest.mark.parametrize('python', ['3.11', '3.12', '3.13'])
def test_the_lock_has_what_setup_asks_for(part, extras, python):
  here = {'python_version': python, 'python_full_version': f'{python}.0', 'sys_platform': 'linux'}
  locked = {}
  for pin, hashes in pins(part):
    assert hashes, pin
    if pin.marker is None or pin.marker.evaluate(here):
      assert pin.name not in locked
      locked[pin.name] = str(pin.specifier).removeprefix('==')
  everything = wanted()
  for text in [each for extra in ['', *extras] for each in everything[extra]]:
    one = Requirement(text)
    assert one.specifier.contains(locked[re.sub('[-_.]+', '-', one.name).lower()]), one
  assert ('pytest' in locked) == (part == 'all')


@pytest.mark.parametrize('name', ['lock', 'tpu_requirements', 'uv'])
def test_a_lock_names_no_index(name):
  text = (ROOT / 'launch' / f'{name}.txt').read_text('utf-8')
  assert '://' not in text and '--index' not in text
  assert text.count('==') < text.count('--hash=sha256:')


@pytest.mark.parametrize(
  ('extras', 'part', 'last'),
  [
    ('', 'quickstart', '--no-deps --no-build-isolation -e .'),
    ('test', 'all', '--no-deps --no-build-isolation -e .'),
    ('test,tpu,parity', 'all', '-e .[tpu,parity]'),
    ('hub', 'quickstart', '-e .[hub]'),
  ],
)
def test_pip_checks_hashes_of_all_but_further_extras(tmp_path, extras, part, last):
  python = tmp_path / 'venv' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  python.write_text(PYTHON)
  python.chmod(0o755)
  calls = tmp_path / 'calls'
  environment = {'VENV': str(tmp_path / 'venv'), 'CALLS': str(calls)}
  for _ in range(2):  # the second time there is nothing to do
    shell(f"ensure_environment '{extras}'", **environment)
  lines = [re.sub('/dev/fd/[0-9]+', 'FILE', line) for line in calls.read_text().splitlines()]
  checked = '--quiet --require-hashes --no-deps --no-build-isolation -r FILE'
  own = '--quiet --no-deps --no-build-isolation -e .'
  assert lines[:3] == [f'{checked} 1', f'{checked} {len(pins(part))}', own]
  assert lines[-1] == f'--quiet {last}' and len(lines) <= 4
