"""The README's recipe "use your adapter elsewhere", on the real Gemma 3 270M.

Its lines are run as they stand: an adapter is merged and written for
transformers, and is loaded by PEFT on the base that was written for it. Both
continue a prompt as `launch.generate` does.
"""

import ast
import json
import os
from pathlib import Path
import re
import subprocess
import sys

import pytest

ROOT = Path(__file__).parents[2]


def blocks() -> list[tuple[str, str]]:
  """(language, text) of each block of code in the recipe, in order."""
  readme = (ROOT / 'README.md').read_text('utf-8')
  section = readme.split('## Use your adapter elsewhere\n')[1].split('\n## ')[0]
  return re.findall(r'```(\w+)\n(.*?)```', section, re.DOTALL)


def run(language: str, text: str, folder: Path) -> str:
  """Runs a block in a folder; what it prints."""
  if language == 'sh':
    text = text.replace('python -m', f'{sys.executable} -m')
    command = ['bash', '-e', '-c', text]
  else:
    command = [sys.executable, '-c', text]
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
  assert found.returncode == 0, found.stderr[-2000:]
  return found.stdout


# The quickstart, cut short.
TRAIN = """python -m launch.train --workdir=DIR \\
  --config=experiments/quickstart.py \\
  --config.steps=8 --config.data.max_eval_records=2
"""


def test_the_recipe_has_its_blocks():
  assert [language for language, _ in blocks()] == ['sh', 'python', 'sh']
  compile(blocks()[1][1], 'README.md', 'exec')


@pytest.mark.real
@pytest.mark.parity
@pytest.mark.slow
def test_merged_model_and_adapter_say_elsewhere_what_they_say_here(tmp_path):
  (tmp_path / 'experiments').symlink_to(ROOT / 'experiments')
  run('sh', TRAIN, tmp_path)
  convert, elsewhere, here = (run(*block, tmp_path) for block in blocks())
  assert [json.loads(x)['output'] for x in convert.splitlines()] == ['my_base', 'my_gemma']
  merged, by_peft = (ast.literal_eval(x)[0] for x in elsewhere.splitlines())
  adapted = json.loads(here)['text']
  assert merged == by_peft == adapted
  plain = blocks()[2][1].replace('--adapter=DIR/adapter ', '')
  assert json.loads(run('sh', plain, tmp_path))['text'] != adapted
