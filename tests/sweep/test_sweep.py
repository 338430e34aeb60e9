"""A sweep from start to finish, killed, shared, refused in part."""

import json
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gemma_jax import files
from gemma_jax.formats import peft, trained_with
from gemma_jax.model.variants import get as variant
from gemma_jax.runs import metrics, prepare, train
from gemma_jax.runs import workdir as workdir_lib
from gemma_jax.runs.evaluate import Stopped
from gemma_jax.sweep import grid, plan, results, worker
from gemma_jax.training import compiler
from tests import sweep_toy, toy

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures('quick_compile')


@pytest.fixture(scope='module')
def records(tmp_path_factory):
  return sweep_toy.write_records(tmp_path_factory.mktemp('records'))


@pytest.fixture(scope='module')
def finished(records, tmp_path_factory):
  """(folder, sweep) with baselines and a rank that is refused."""
  folder = tmp_path_factory.mktemp('sweep')
  config = sweep_toy.config(
    records, ranks=(1, 2, 5, 99), baselines=('base', 'full'), full_learning_rates=(1e-4,)
  )
  return folder, worker.run(config.resolve(), str(folder))


def losses(folder):
  """Every held-out loss of a sweep, by file."""
  return {
    str(path.relative_to(folder)): path.read_text()
    for path in sorted(Path(folder).glob('cells/*/heldout/*'))
  }


def adapters(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(Path(folder).glob('cells/*/adapter/*.safetensors'))
  }


def test_a_cell_equals_its_config_trained_alone(finished, records, tmp_path):
  _, sweep = finished
  cell = next(c for c in sweep.trials if c.name == 'r2-s3-lr0.01')
  cells = grid.make_trials(sweep_toy.config(records).resolve(), variant('tiny3'))
  config = next(c.config for c in cells if c.name == cell.name)
  result = train.train(config.resolve(), str(tmp_path))
  toy.assert_close(cell.result['loss_adapted'], result['loss_adapted'], 1e-5)
  for step in (2, 4, 5):
    alone = workdir_lib.read_heldout(str(tmp_path), step)
    toy.assert_close(cell.losses[step][0], np.array([row['nll'] for row in alone]), 1e-4)
  first, second = (
    peft.read_adapter(path / 'adapter', variant('tiny3')) for path in (cell.folder, tmp_path)
  )
  assert first[0] == second[0]
  toy.assert_close(first[1], second[1], 1e-4)
  first, second = (
    trained_with.TrainedWith.read(path / 'adapter') for path in (cell.folder, tmp_path)
  )
  assert first is not None
  assert first == second
  alone = [r for r in metrics.read(tmp_path / 'metrics.jsonl') if r['step']]
  names = ('loss_nats_per_token', 'learning_rate', 'grad_norm')
  together = metrics.read(cell.folder / 'metrics.jsonl')
  for mine, other in zip(together, alone, strict=True):
    for name in names:
      if name in other:
        toy.assert_close(mine[name], other[name], 1e-5, name)


def test_a_refused_rank_fails_its_cells_and_no_other(finished):
  _, sweep = finished
  failed = [cell for cell in sweep.trials if cell.error is not None]
  assert {cell.axes['rank'] for cell in failed} == {99}
  assert len(failed) == 4
  assert all('expected at most' in cell.error for cell in failed)
  assert len(sweep.finished('lora')) == 12
  assert len(sweep.finished('full')) == 2


def test_the_base_cell_is_the_base(finished):
  """Also of the full baseline: it has evaluated the base at step 0."""
  _, sweep = finished
  (base,) = sweep.finished('base')
  full = sweep.finished('full')[0]
  toy.assert_close(base.last[0], full.losses[0][0], 1e-4)
  q, v = 34 * 4 * 16, 34 * 16  # D N H and D K H, in each of 3 layers
  assert full.entry['trainable_parameters'] == 3 * (q + v)


def test_validation_and_test_are_apart_and_together_everything(finished):
  _, sweep = finished
  validation, test = sweep.part('validation'), sweep.part('test')
  assert validation.any()
  assert test.any()
  np.testing.assert_array_equal(validation, ~test)


def test_the_rate_is_chosen_on_validation(finished):
  _, sweep = finished
  part = sweep.part('validation')
  for arm, cells in sweep.chosen().items():
    mean = lambda rate, arm=arm: np.mean(
      [
        cell.loss(part)
        for cell in sweep.finished('lora')
        if cell.arm == arm and cell.axes['learning_rate'] == rate
      ]
    )
    rate = cells[0].axes['learning_rate']
    assert mean(rate) == min(mean(1e-3), mean(1e-2))
    assert [cell.axes['seed'] for cell in cells] == [0, 3]


def test_truncated_cells_and_samples(finished):
  folder, sweep = finished
  cut = sweep.finished('truncated')
  assert sorted((c.axes['rank'], c.axes['seed']) for c in cut) == [(1, 0), (1, 3), (2, 0), (2, 3)]
  lines = (folder / 'samples.jsonl').read_text().splitlines()
  assert len(lines) == 2
  answers = json.loads(lines[0])['answers']
  assert next(iter(answers)) == 'base'
  assert len(answers) == 4
  assert not (folder / 'jobs').exists()


def test_spectra_have_the_cells_rank(finished):
  _, sweep = finished
  for cell in sweep.finished('lora'):
    for values in cell.spectrum(2).values():
      assert values.shape == (3, cell.axes['rank'])
      assert (values > 0).all()


def test_table_shows_scale_and_state(finished):
  _, sweep = finished
  table = results.table(sweep)
  (line,) = [x for x in table.splitlines() if x.startswith('r5-s0-lr0.01')]
  assert line.split()[2] == '1'  # alpha 5 / rank 5
  assert line.endswith('finished')
  assert 'failed: lora.rank: got 99' in table


def test_again_changes_nothing(finished, records):
  folder, _ = finished
  before = {p: p.stat().st_mtime_ns for p in folder.rglob('*') if p.is_file()}
  config = sweep_toy.config(
    records, ranks=(1, 2, 5, 99), baselines=('base', 'full'), full_learning_rates=(1e-4,)
  )
  worker.run(config.resolve(), str(folder))
  after = {p: p.stat().st_mtime_ns for p in folder.rglob('*') if p.is_file()}
  assert after == before


def test_other_records_are_refused_and_the_same_elsewhere_are_not(finished, tmp_path):
  folder, _ = finished
  before = {p: p.stat().st_mtime_ns for p in folder.rglob('*') if p.is_file()}
  axes = {'ranks': (1, 2, 5, 99), 'baselines': ('base', 'full'), 'full_learning_rates': (1e-4,)}
  config = sweep_toy.config(sweep_toy.write_records(tmp_path), **axes)
  worker.run(config.resolve(), str(folder))
  sweep_toy.write_records(tmp_path, count=58)
  with pytest.raises(ValueError, match='its data had the fingerprint'):
    worker.run(config.resolve(), str(folder))
  after = {p: p.stat().st_mtime_ns for p in folder.rglob('*') if p.is_file()}
  assert {p: x for p, x in after.items() if 'leases' not in p.parts} == {
    p: x for p, x in before.items() if 'leases' not in p.parts
  }


def test_cells_without_their_manifest_are_refused(finished, records, tmp_path):
  shutil.copytree(finished[0] / 'cells', tmp_path / 'cells')
  config = sweep_toy.config(records).resolve()
  with pytest.raises(ValueError, match=r'has trials but no manifest\.json'):
    worker.run(config, str(tmp_path))


@pytest.fixture
def small(tmp_path):
  """(config, records, heldout) of a sweep with a gang a seed.

  A held-out record has every character that only `str.splitlines` takes for
  the end of a line.
  """
  records = Path(sweep_toy.write_records(tmp_path, count=40))
  heldout = tmp_path / 'heldout.jsonl'
  rows = files.read_json_lines(heldout)
  rows[3]['instruction'] = 'Where\u2028is\u2029the\x85old\x0bhill?'
  files.write_json_lines(heldout, rows)
  config = sweep_toy.config(
    str(records), ranks=(1,), learning_rates=(1e-3,), truncate=False, sample_prompts=1
  )
  return config.resolve(), records, heldout


def after_first_gang(workdir, action):
  """should_stop that does something once, when the first gang has ended."""
  done = []

  def should_stop():
    if not done and list(workdir.glob('cells/r1-s0-*/result.json')):
      done.append(action())
    return False

  return should_stop


def test_a_file_that_is_away_fails_no_cell(small, tmp_path):
  """The same command ends the sweep when it is back; so it does for a lost hub
  or disk."""
  config, records, _ = small
  workdir, away = tmp_path / 'sweep', tmp_path / 'away'
  hook = after_first_gang(workdir, lambda: records.rename(away))
  with pytest.raises(ValueError, match=r'records\.jsonl'):
    worker.run(config, str(workdir), hook)
  assert not list(workdir.glob('cells/*/failed.json'))
  assert len(results.read(str(workdir)).finished('lora')) == 1
  away.rename(records)
  sweep = worker.run(config, str(workdir))
  assert len(sweep.finished('lora')) == 2
  assert sweep.heldout[3]['prompt'] == 'Where\u2028is\u2029the\x85old\x0bhill?'
  assert len(files.read_json_lines(workdir / 'samples.jsonl')) == 1


def test_records_that_change_under_way_are_not_mixed(small, tmp_path):
  config, records, _ = small
  workdir, content = tmp_path / 'sweep', records.read_bytes()
  other = content.replace(b'Past', b'Near', 1)
  hook = after_first_gang(workdir, lambda: records.write_bytes(other))
  with pytest.raises(ValueError, match='its data had the fingerprint'):
    worker.run(config, str(workdir), hook)
  assert len(results.read(str(workdir)).finished('lora')) == 1
  records.write_bytes(content)
  assert len(worker.run(config, str(workdir)).finished('lora')) == 2


def test_another_sweep_is_refused(finished, records):
  config = sweep_toy.config(records, ranks=(1, 2)).resolve()
  with pytest.raises(ValueError, match=r'grid\.\w+='):
    worker.run(config, str(finished[0]))


@pytest.mark.parametrize('asked', [3, 9])
def test_stopped_and_resumed_equals_undisturbed(finished, records, tmp_path, asked):
  """To the bit: the same gangs, the same program, from a checkpoint."""
  config = sweep_toy.config(records, ranks=(1, 2, 5, 99), truncate=False, sample_prompts=0)
  count = [0]

  def should_stop():
    count[0] += 1
    return count[0] > 5 + asked

  with pytest.raises(Stopped):
    worker.run(config.resolve(), str(tmp_path), should_stop)
  worker.run(config.resolve(), str(tmp_path))
  whole = adapters(finished[0])
  mine = adapters(tmp_path)
  assert mine
  assert mine == {name: whole[name] for name in mine}
  evaluations = losses(finished[0])
  assert all(evaluations[name] == x for name, x in losses(tmp_path).items())


def launch(config, workdir, *flags):
  command = [sys.executable, '-m', 'launch.sweep', f'--config={config}']
  return subprocess.Popen(
    [*command, f'--workdir={workdir}', *flags],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
def test_kill_9_in_the_middle_and_the_same_command_again(records, tmp_path):
  """Two processes share the folder; one is killed, the other two go on."""
  config = sweep_toy.config_file(
    tmp_path, records, seeds=(0, 1), max_gang=3, truncate=False, sample_prompts=0
  )
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  undisturbed = launch(config, whole)
  victim = launch(config, broken)
  deadline = time.monotonic() + 240
  while time.monotonic() < deadline and victim.poll() is None:
    if list(broken.glob('jobs/*/checkpoints/2')):
      break
    time.sleep(0.02)
  victim.send_signal(signal.SIGKILL)
  victim.wait()
  assert list(broken.glob('leases/gang-*'))
  both = [launch(config, broken) for _ in range(2)]
  jobs = []
  for process in (undisturbed, *both):
    out, log = process.communicate(timeout=400)
    assert process.returncode == 0, log
    assert 'r5-s1-lr0.01' in out
    jobs.append(re.findall(r'Job (gang-\d): ', log))
  assert adapters(broken) == adapters(whole)
  assert losses(broken) == losses(whole)
  # Together they did every job once, the victim's from its checkpoint.
  assert sorted(jobs[1] + jobs[2]) == sorted(jobs[0])


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--config.grid.ranks=(4,4)'], 'grid: got the trial r4-s0-lr0.001 twice'),
    (
      [f'--config.grid.{axis}=()' for axis in ('ranks', 'seeds')]
      + ['--config.grid.learning_rates=()'],
      'expected an axis with values',
    ),
    (['--config.data.path=missing.jsonl'], 'missing.jsonl'),
    (['--config.grid.rank=(4,)'], 'rank'),
  ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(records, tmp_path, flags, message):
  config = sweep_toy.config_file(tmp_path, records)
  process = launch(config, tmp_path / 'mistake', *flags)
  _, log = process.communicate(timeout=200)
  assert process.returncode == 1
  errors = [x for x in log.splitlines() if x.startswith('error: ')]
  assert len(errors) == 1, log
  assert message in errors[0]
  assert not (tmp_path / 'mistake').exists()


def test_an_experiment_without_a_grid_is_refused(tmp_path):
  process = launch('experiments/dolly_lora.py', tmp_path / 'run')
  _, log = process.communicate(timeout=200)
  assert process.returncode == 1
  assert '--config: got a TrainConfig, expected a SweepConfig' in log


def test_a_member_that_diverges_fails_alone(records, tmp_path):
  config = sweep_toy.config(
    records, ranks=(2,), seeds=(0,), learning_rates=(1e-3, 1e30), truncate=False, sample_prompts=0
  )
  config.base.optimizer.clip_norm = 0.0
  sweep = worker.run(config.resolve(), str(tmp_path))
  good, bad = (c for c in sweep.trials if c.kind == 'lora')
  assert good.result is not None
  assert 'expected a finite number' in bad.error


def test_gangs_are_split_by_memory(records, caplog):
  cells = grid.make_trials(sweep_toy.config(records).resolve(), variant('tiny3'))
  configs = [c.config.resolve() for c in cells if c.kind == 'lora' and c.axes['seed'] == 0]
  caplog.set_level('INFO')
  assert plan.split(configs) == [[0, 1, 2, 3, 4, 5]]
  three = plan.peak_bytes(prepare.outline(configs[2]), 3, 1 << 40)
  found = plan.split(configs, limit_bytes=three)
  assert found == [[0, 1, 2], [3, 4, 5]]
  assert '6 trials are trained as 2 batches of adapters' in caplog.text


def test_devices_that_do_not_say_their_memory(records, monkeypatch):
  monkeypatch.setattr(compiler, 'memory_limit_bytes', lambda mesh: None)
  with pytest.raises(ValueError, match=r'Set grid\.memory_gib=GIB'):
    plan.split([sweep_toy.config(records).base.resolve()])


def test_a_sweep_of_which_every_cell_is_refused(records, tmp_path):
  config = sweep_toy.config(records, ranks=(99,)).resolve()
  with pytest.raises(ValueError, match='none of which can run'):
    worker.run(config, str(tmp_path))
  assert not list(tmp_path.iterdir())
