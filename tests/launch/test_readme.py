"""Commands, fields and defaults that the two README files name are there."""

import ast
from pathlib import Path
import re

import pytest

from gemma_jax.config.sweep import GridConfig
from gemma_jax.config.train import TrainConfig, flatten, to_dict

ROOT = Path(__file__).parents[2]
TEXTS = {name: (ROOT / name).read_text('utf-8') for name in ('README.md', 'launch/README.md')}
FIELDS = flatten(to_dict(TrainConfig()))
GRID = flatten({'grid': to_dict(GridConfig())})


def blocks(text):
  """Commands in the blocks of shell, one on each line."""
  for block in re.findall(r'```(?:sh)?\n(.*?)```', text, re.DOTALL):
    yield from re.sub(r'\\\n', '', block).splitlines()


@pytest.mark.parametrize('name', TEXTS)
def test_commands_have_the_flags_that_are_given(name):
  commands = [line for line in blocks(TEXTS[name]) if 'python -m launch.' in line]
  assert len(commands) > 5
  app = (ROOT / 'launch' / 'app.py').read_text('utf-8')
  for line in commands:
    for module, flags in re.findall(r'python -m launch\.(\w+)(.*?)(?= -- |$)', line):
      source = (ROOT / 'launch' / f'{module}.py').read_text('utf-8') + app
      for flag in re.findall(r' --(\w+)(?=[=\s]|$)', flags):
        is_there = re.search(rf"DEFINE_\w+\(\s*'{flag}'", source)
        assert is_there or flag in ('config', 'help'), f'{flag}: {line}'


@pytest.mark.parametrize('name', TEXTS)
def test_fields_that_are_set_are_there(name):
  fields = re.findall(r'--config\.([\w.]+)=', TEXTS[name])
  assert len(fields) > 5
  for field in fields:
    assert field in FIELDS | GRID, field


def test_table_of_other_tools_has_our_defaults():
  table = TEXTS['launch/README.md'].split('## From other tools\n')[1]
  here = '\n'.join(line.split(' | ')[1] for line in table.splitlines() if line.startswith('| '))
  assert len(re.findall('`[a-z_.]+`', here)) > 20
  for field in re.findall('`([a-z_.]+)`', here):
    assert field in FIELDS, field
  given = re.findall(r"`([a-z_.]+)` \(('\w*'|[\w.-]+)", here)
  assert len(given) > 18
  for field, default in given:
    assert ast.literal_eval(default) == FIELDS[field], field


def test_links_inside_the_guides_lead_to_headings():
  def anchors(text):
    for title in re.findall(r'^#+ (.*)$', text, re.M):
      yield re.sub(r'[^\w -]', '', title).lower().replace(' ', '-')

  for name, text in TEXTS.items():
    links = re.findall(r'\]\(([\w./]*)#([\w-]+)\)', text)
    assert links
    for file, anchor in links:
      path = (ROOT / name).parent / file if file else ROOT / name
      assert anchor in set(anchors(path.read_text('utf-8'))), f'{file}#{anchor}'
