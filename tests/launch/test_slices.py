"""The table of slices in launch/README.md is what its commands say."""

import json
import os
from pathlib import Path
import re
import subprocess
import sys

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / 'launch' / 'README.md').read_text()

# | Gemma 1 2B | v5e-1 | 1 x 2048 | fits: 5.51 GiB | ... | `forecast ...` |
ROWS = re.findall(
  r'^\|.*\| (fits|does not fit): ([\d.]+) GiB \|.*\| `(forecast .*?)` \|$', README, re.MULTILINE
)


def test_the_table_has_rows_that_fit_and_one_that_does_not():
  assert {verdict for verdict, _, _ in ROWS} == {'fits', 'does not fit'}
  assert 'forecast() {' in README


def run(command):
  """Figures of a row's command, in the shell that the README describes."""
  (function,) = re.findall(r'```sh\n(forecast\(\) \{.*?\n\})\n```', README, re.S)
  bin_folder = Path(sys.executable).parent
  done = subprocess.run(
    ['bash', '-c', f'{function}\n{command} --format=json'],
    cwd=ROOT,
    env={**os.environ, 'PATH': f'{bin_folder}:{os.environ["PATH"]}'},
    capture_output=True,
    text=True,
    check=False,
  )
  return done.returncode, json.loads(done.stdout)


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize('verdict', ['fits', 'does not fit'])
def test_two_rows_are_still_so(verdict):
  _, gib, command = next(row for row in ROWS if row[0] == verdict)
  code, figures = run(command)
  assert code == (verdict != 'fits')
  assert figures['fits'] == (verdict == 'fits')
  assert figures['needed_bytes'] / 2**30 == pytest.approx(float(gib), rel=0.02)
