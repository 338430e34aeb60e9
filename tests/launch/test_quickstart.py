"""The quickstart's command, on a tiny base, in the plain C locale."""

import json
import os
import shlex
import subprocess
import sys

import pytest

from gemma_jax import files
from launch import app
from tests import run_toy
from tests.launch.test_launch import ROOT

PROMPT = 'Where is the palace? 궁은 어디에?'


def call(*flags):
  """Runs the command where the locale cannot say what Korean is."""
  locale = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
  return subprocess.run(
    [sys.executable, '-m', 'launch.quickstart', *flags],
    cwd=ROOT,
    capture_output=True,
    encoding='utf-8',
    env=os.environ | locale,
    check=False,
  )


@pytest.fixture(scope='module')
def done(tmp_path_factory):
  """A quickstart, the same again, again with 9 held-out records, and with greedy answers."""
  folder = tmp_path_factory.mktemp('quickstart')
  records = run_toy.write_records(folder)
  rows = files.read_json_lines(records)
  for row in rows:
    row['instruction'] += ' 서울\u2028어디에?'
  files.write_json_lines(records, rows)
  flags = (
    f'--config={run_toy.config_file(folder, records, steps=5)}',
    f'--config.data.eval_path={records}',
    f'--workdir={folder / "run"}',
    f'--prompt={PROMPT}',
    '--max_new_tokens=7',
  )
  first, again = call(*flags), call(*flags)
  greedy = call(*flags, '--greedy')
  for path in (folder / 'run' / 'heldout').iterdir():
    files.write_json_lines(path, files.read_json_lines(path)[:9])
  return first, again, call(*flags), greedy


def test_shows_the_table_both_answers_and_the_loss(done):
  assert done[0].returncode == 0, done[0].stderr
  text = done[0].stdout
  parts = ('total with optimizer', f'base: {PROMPT}', f'adapted: {PROMPT}', 'held-out loss, nats')
  places = [text.index(part) for part in parts]
  assert places == sorted(places)
  assert '\\u' not in text


def test_the_last_line_is_the_result(done):
  result = json.loads(done[0].stdout.splitlines()[-1])
  low, high = result['difference_interval']
  assert low < result['loss_adapted'] - result['loss_base'] < high
  assert result['steps'] == 5
  assert isinstance(result['answer_base'], str)
  assert isinstance(result['answer_adapted'], str)


def test_the_next_commands_are_spelt_with_their_interpreter(done):
  python = app.python()
  lines = done[0].stderr.splitlines()[-2:]
  asked, trained = (shlex.split(line)[:3] for line in lines)
  assert asked == [python, '-m', 'launch.generate'] and trained == [python, '-m', 'launch.train']
  assert '--adapter=' in lines[0] and '--config.data.path=' in lines[1]
  assert subprocess.run([python, '-c', 'import absl'], cwd=ROOT, check=False).returncode == 0


def test_the_interval_says_what_it_is_over(done):
  assert ('one seed, so over the 20 records alone: 95 % interval of the difference [') in done[
    0
  ].stdout


def test_few_records_give_no_interval(done):
  assert '9 held-out records, no interval with fewer than 10' in done[2].stdout
  result = json.loads(done[2].stdout.splitlines()[-1])
  assert result['difference_interval'] is None


def test_answers_are_drawn_unless_greedy_ones_are_asked_for(done, tmp_path):
  said = 'answers, drawn with temperature 0.7, top_p 0.9, seed 0:'
  assert said in done[0].stdout and 'answers, greedy:' in done[3].stdout
  drawn, greedy = (json.loads(done[i].stdout.splitlines()[-1]) for i in (0, 3))
  assert drawn['answer_base'] != greedy['answer_base']
  # The adapter is the same, and so is its greedy answer elsewhere.
  command = [sys.executable, '-m', 'launch.generate', '--model=random:tiny3', '--format=json']
  command += [f'--adapter={greedy["adapter"]}', f'--prompt={PROMPT}', '--max_new_tokens=7']
  for flags, result in (
    ([], greedy),
    (['--temperature=0.7', '--top_p=0.9', '--seed=0'], drawn),
  ):
    lines = subprocess.run([*command, *flags], cwd=ROOT, check=True, capture_output=True).stdout
    assert json.loads(lines)['text'] == result['answer_adapted']
  del drawn['answer_base'], drawn['answer_adapted']
  assert drawn.items() <= greedy.items()


def test_again_it_shows_the_same_without_training(done):
  assert done[1].returncode == 0
  assert done[1].stdout == done[0].stdout
  assert 'has finished at step 5' in done[1].stderr
