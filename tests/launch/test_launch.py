"""The commands as a user calls them: results, help, one-line errors."""

from dataclasses import fields
import json
from pathlib import Path
import re
import shutil
import subprocess
import sys

import pytest

from gemma_jax.config.sweep import GridConfig
from tests import run_toy

ROOT = Path(__file__).parents[2]


def call(command, *flags):
  """Runs `python -m launch.COMMAND FLAGS` from the repository root."""
  return subprocess.run(
    [sys.executable, '-m', f'launch.{command}', *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('launch')


@pytest.fixture(scope='module')
def records(folder):
  return run_toy.write_records(folder)


@pytest.fixture(scope='module')
def trained(folder, records):
  """Workdir and completed process of a short run."""
  config = run_toy.config_file(folder, records, steps=3)
  workdir = folder / 'run'
  return workdir, call('train', f'--config={config}', f'--workdir={workdir}')


def test_train_prints_the_result_last(trained):
  workdir, done = trained
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout.splitlines()[-1])
  assert result['steps'] == 3
  assert result['adapter'] == f'{workdir}/adapter'
  assert {'tokens', 'seconds', 'loss_base', 'loss_adapted'} <= result.keys()
  assert 'total with optimizer' in done.stderr
  assert 'Step 3: held-out loss' in done.stderr


def test_the_log_is_kept_over_all_resumes(tmp_path, records):
  config = run_toy.config_file(tmp_path, records, steps=2)
  workdir = tmp_path / 'logged'
  command = ('train', f'--config={config}', f'--workdir={workdir}')
  first, finished, more = call(*command), call(*command), call(*command, '--config.steps=3')
  lines = (workdir / 'log.txt').read_text('utf-8').splitlines()
  days = {line[:11] for line in lines if not line.startswith(' ')}
  assert all(re.fullmatch(r'\d{4}-\d\d-\d\d ', day) for day in days)
  said = [line[11:] if line[:11] in days else line for line in lines]
  assert 'has finished' in finished.stderr  # and that changes nothing
  assert said == (first.stderr + more.stderr).splitlines()
  refused = call(*command, '--config.seed=7')
  assert refused.returncode == 1
  assert len((workdir / 'log.txt').read_text('utf-8').splitlines()) == len(lines)


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path, records):
  config = run_toy.config_file(tmp_path, records, steps=2)
  workdir = tmp_path / 'unlogged'
  (workdir / 'log.txt').mkdir(parents=True)
  done = call('train', f'--config={config}', f'--workdir={workdir}')
  assert done.returncode == 0, done.stderr
  assert done.stderr.count('log.txt: Is a directory; the run goes on without it.') == 1


def test_train_again_says_that_it_has_finished(folder, trained):
  workdir, done = trained
  again = call('train', f'--config={folder / "toy_experiment.py"}', f'--workdir={workdir}')
  assert again.returncode == 0
  assert 'has finished at step 3' in again.stderr
  assert json.loads(again.stdout) == json.loads(done.stdout.splitlines()[-1])


def test_evaluate_prints_a_line_for_each_adapter(folder, records, trained):
  out = folder / 'per_example.jsonl'
  done = call(
    'evaluate',
    '--model=random:tiny3',
    '--adapter=base',
    f'--adapter={trained[0]}/adapter',
    f'--data={records}',
    f'--per_example={out}',
  )
  assert done.returncode == 0, done.stderr
  lines = [json.loads(line) for line in done.stdout.splitlines()]
  assert [line['adapter'] for line in lines] == ['base', f'{trained[0]}/adapter']
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert len(rows) == 40
  for line in lines:
    mine = [row for row in rows if row['adapter'] == line['adapter']]
    assert [row['index'] for row in mine] == list(range(20))
    assert sum(row['tokens'] for row in mine) == line['tokens']
    assert abs(sum(row['nll'] for row in mine) - line['nll']) < 1e-6


def test_evaluate_measures_adapters_on_the_same_tokens(folder, records, trained):
  other = folder / 'korean'
  shutil.copytree(trained[0] / 'adapter', other)
  path = other / 'gemma_jax.json'
  path.write_text(path.read_text().replace('dolly', 'korean'))
  flags = [
    '--model=random:tiny3',
    f'--adapter={trained[0]}/adapter',
    f'--adapter={other}',
    f'--data={records}',
    '--max_records=2',
  ]
  done = call('evaluate', *flags)
  assert done.returncode == 1
  assert 'was trained with dolly' in done.stderr.splitlines()[-1]
  assert 'korean with korean' in done.stderr.splitlines()[-1]
  assert 'Set --template=dolly' in done.stderr.splitlines()[-1]
  done = call('evaluate', *flags, '--template=dolly')
  assert done.returncode == 0, done.stderr
  lines = [json.loads(line) for line in done.stdout.splitlines()]
  assert lines[0]['nll'] == lines[1]['nll']
  assert f'--template=dolly: {other} was trained with korean' in done.stderr


def test_evaluate_takes_token_records_without_a_tokenizer(folder):
  path = folder / 'tokens.jsonl'
  path.write_text(
    '{"tokens": [2, 11, 13, 17, 1]}\n{"tokens": [2, 19, 23], "loss_mask": [0, 0, 1]}\n'
  )
  done = call('evaluate', '--model=random:tiny2', f'--data={path}')
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout)['tokens'] == 5


def test_summary_as_json_and_table():
  flags = ('--config=experiments/keras_tutorial.py', '--model=random:gemma_2b')
  done = call('summary', *flags, '--format=json')
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found['adapter'] == 1_363_968
  assert found['model_total_bytes'] == 4 * 2_507_536_384
  assert '2,507,536,384' in call('summary', *flags).stdout


def test_dry_run_prints_and_leaves_nothing(folder, records):
  config = run_toy.config_file(folder, records)
  workdir = folder / 'dry'
  done = call('train', f'--config={config}', f'--workdir={workdir}', '--dry_run')
  assert done.returncode == 0, done.stderr
  assert 'memory of the training step' in done.stdout
  assert not workdir.exists()


@pytest.mark.parametrize('command', ['train', 'evaluate', 'summary', 'verify'])
def test_help_explains(command):
  done = call(command, '--help')
  assert done.returncode == 0
  text = done.stdout
  assert f'python -m launch.{command}' in text
  assert '--debug' in text.replace('--[no]debug', '--debug')


@pytest.mark.parametrize(
  ('command', 'experiment', 'message'),
  [
    ('train', 'rank_ablation', 'got a SweepConfig, expected a TrainConfig'),
    ('summary', 'rank_ablation', 'got a SweepConfig, expected a TrainConfig'),
    ('sweep', 'dolly_lora', 'got a TrainConfig, expected a SweepConfig'),
  ],
)
def test_a_config_of_another_command_is_refused(command, experiment, message):
  done = call(command, f'--config=experiments/{experiment}.py', '--config.steps=3')
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()
  assert line.startswith(f'error: --config: {message}')


def test_every_field_of_a_sweep_is_explained():
  """Those of its base as for a single run, then those of the grid."""
  single, sweep = (
    call(command, f'--config=experiments/{name}.py', '--help_config', '--config.steps=7')
    for command, name in (('train', 'dolly_lora'), ('sweep', 'rank_ablation'))
  )
  names = [re.findall(r'^--(config[.\w]+)=', x.stdout, re.MULTILINE) for x in (single, sweep)]
  assert '--config.steps=7\n' in sweep.stdout
  assert names[1][: len(names[0])] == names[0]
  assert names[1][len(names[0]) :] == [f'config.grid.{x.name}' for x in fields(GridConfig)]


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--config.lora.rank=0'], 'lora.rank: got 0'),
    (['--config.lora.rnk=8'], "field 'rnk', expected one of rank, alpha, "),
    (['--config.lora.rank=x'], 'config.lora.rank'),
    (['--config.lora.targets=nothing'], 'lora.targets'),
    (['--config.lora.targets=embedder'], 'tied'),
    (['--config.trainable=("nothing",)'], 'matches no leaf'),
    (['--config.model.path=missing.gguf'], 'missing.gguf'),
    (['--config.model.dtype=float16'], 'float16 overflows'),
    (['--config.data.path=missing.jsonl'], 'missing.jsonl'),
    (['--config.data.template=nothing'], 'template'),
    (['--config.data.seq_len=9999'], 'data.seq_len'),
    (['--confg=x'], 'confg'),
    (['--config=missing.py'], "got 'missing.py', which is not a file"),
  ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(folder, records, flags, message):
  config = run_toy.config_file(folder, records)
  workdir = folder / 'mistake'
  done = call('train', f'--config={config}', f'--workdir={workdir}', *flags)
  assert done.returncode == 1
  errors = [x for x in done.stderr.splitlines() if x.startswith('error: ')]
  assert len(errors) == 1, done.stderr
  assert message in errors[0]
  assert 'Traceback' not in done.stderr
  assert not workdir.exists()


@pytest.mark.parametrize('command', ['sweep', 'quickstart'])
def test_a_misspelt_field_is_one_line_where_a_config_is_the_default(command):
  done = call(command, '--config.stpes=3')
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: --config: got the field 'stpes'")


@pytest.mark.parametrize('platform', ['cuda', 'nonsense'])
def test_a_device_that_is_not_there_is_one_line(folder, records, monkeypatch, platform):
  monkeypatch.setenv('JAX_PLATFORMS', platform)
  config = run_toy.config_file(folder, records)
  done = call('train', f'--config={config}', f'--workdir={folder / "no_device"}')
  if platform == 'cuda' and done.returncode == 0:
    pytest.skip('this machine has one')
  assert done.returncode == 1
  last = done.stderr.splitlines()[-1]
  assert last.startswith(f'error: JAX_PLATFORMS: got {platform!r}, but JAX finds no such device')
  assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('def get_config(:\n', 'SyntaxError: invalid syntax'),
    ('x = 1\n', "no attribute 'get_config'"),
    ('import missing_package\n', "No module named 'missing_package'"),
    ('def get_config():\n  raise ValueError("no luck")\n', 'no luck'),
  ],
)
def test_a_broken_experiment_file_is_one_line(folder, content, message):
  path = folder / 'broken.py'
  path.write_text(content)
  done = call('train', f'--config={path}', f'--workdir={folder}/broken')
  assert done.returncode == 1
  assert done.stderr.startswith('error: ')
  assert message in done.stderr
  assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('', 'empty'),
    ('{"instruction": "a"}\n', 'line 1: field "response" is missing'),
    ('{"instruction": "a", "response": "b"}\n{"x\n', 'line 2'),
  ],
)
def test_bad_records_name_file_and_line(folder, content, message):
  path = folder / 'bad.jsonl'
  path.write_text(content)
  config = run_toy.config_file(folder, str(path))
  done = call('train', f'--config={config}', f'--workdir={folder}/bad')
  assert done.returncode == 1
  assert 'bad.jsonl' in done.stderr
  assert message in done.stderr.splitlines()[-1]


def test_debug_shows_the_traceback(folder, records):
  config = run_toy.config_file(folder, records)
  done = call('train', f'--config={config}', '--config.lora.rank=0', '--workdir=x', '--debug')
  assert done.returncode == 1
  assert 'Traceback' in done.stderr
