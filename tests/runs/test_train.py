"""A run from start to finish, stopped, killed, resumed and refused."""

import json
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time

from etils import epath
import jax
import jaxlib
import numpy as np
import pytest

import gemma_jax
from gemma_jax import files, pytree
from gemma_jax.config.train import LoraConfig
from gemma_jax.formats import open_base, peft
from gemma_jax.model import variants
from gemma_jax.runs import checksums, metrics, train, trainer
from gemma_jax.runs import prepare as run_lib
from gemma_jax.runs import workdir as workdir_lib
from gemma_jax.runs.program import Program
from tests import gcs_toy, hf_toy, peft_toy, run_toy

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def records(tmp_path_factory):
  return run_toy.write_records(tmp_path_factory.mktemp('records'))


@pytest.fixture(scope='module')
def finished(records, tmp_path_factory):
  """(workdir, result) of an undisturbed run."""
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  result = train.train(run_toy.config(records).resolve(), str(workdir))
  return workdir, result


def adapter_bytes(workdir, name='adapter'):
  return (Path(workdir) / name / 'adapter_model.safetensors').read_bytes()


def stop_after(batches):
  """should_stop that says yes when it is asked for the n-th time."""
  asked = iter(range(batches))
  return lambda: next(asked, None) is None


def test_learns_and_reports(finished):
  workdir, result = finished
  assert result['steps'] == 7
  assert result['loss_adapted'] < result['loss_base']
  assert result['loss_best'] <= result['loss_adapted']
  saved = json.loads((workdir / 'result.json').read_text())
  assert saved.pop('run')['steps'] == 7
  assert {**saved, 'adapter': f'{workdir}/adapter'} == result
  rows = metrics.read(workdir / 'metrics.jsonl')
  updates = [row for row in rows if 'loss_nats_per_token' in row]
  evaluations = [row for row in rows if 'eval_loss_nats_per_token' in row]
  assert [row['step'] for row in updates] == [1, 2, 3, 4, 5, 6, 7]
  assert [row['step'] for row in evaluations] == [0, 3, 6, 7]
  assert evaluations[0]['eval_loss_nats_per_token'] == result['loss_base']
  assert sum(row['tokens'] for row in updates) == result['tokens']
  assert list((workdir / 'tensorboard').iterdir())
  assert updates[0]['first_step_secs'] > updates[0]['step_secs']
  assert not any('first_step_secs' in row for row in updates[1:])


@pytest.mark.parametrize(
  'name, after', [('adapter', 'loss_adapted'), ('adapter_best', 'loss_best')]
)
def test_model_card_says_what_the_run_knows(finished, records, name, after):
  workdir, result = finished
  card = (workdir / name / 'README.md').read_text()
  assert f'training records of `{Path(records).name}`; ' in card
  assert str(Path(records).parent) not in card
  assert f'{result["loss_base"]:.4f} before this run, {result[after]:.4f} after' in card
  assert ('(the lowest of 4)' in card) == (name == 'adapter_best')
  if name == 'adapter':
    assert f'7 updates, {result["tokens"]:,} tokens' in card


def test_padded_rows_measure_what_packed_ones_do(records, finished, tmp_path):
  """Each record in a row of its own, cut to the length of its batch."""
  config = run_toy.config(records, steps=2)
  config.data.packing = False
  result = train.train(config.resolve(), str(tmp_path))
  packed = finished[1]['loss_base']
  np.testing.assert_allclose(result['loss_base'], packed, rtol=1e-5)
  assert result['loss_adapted'] < result['loss_base']


def test_held_out_losses_are_kept_by_record(finished):
  workdir, result = finished
  for step, name in ((0, 'loss_base'), (7, 'loss_adapted')):
    lines = (workdir / 'heldout' / f'step_{step}.jsonl').read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    nll = sum(row['nll'] for row in rows) / sum(row['tokens'] for row in rows)
    np.testing.assert_allclose(nll, result[name], rtol=1e-12)


def test_a_workdir_in_use_is_refused(records, tmp_path):
  config = run_toy.config(records).resolve()
  with (
    workdir_lib.only_run(str(tmp_path)),
    pytest.raises(ValueError, match='another process is training in it'),
  ):
    train.train(config, str(tmp_path))
  assert not list(tmp_path.iterdir())


def test_finished_run_changes_nothing(finished, records):
  workdir, result = finished
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*')}
  again = train.train(run_toy.config(records).resolve(), str(workdir))
  assert again == result
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob('*')} == before


@pytest.mark.parametrize('asked', [0, 1, 2, 4, 6, 9, 12])
def test_stopped_and_resumed_equals_uninterrupted(finished, records, tmp_path, asked, caplog):
  """Stops before the first step, in the first evaluation, between checkpoints
  and in a later evaluation."""
  config = run_toy.config(records).resolve()
  with pytest.raises(train.Stopped):
    train.train(config, str(tmp_path), stop_after(asked))
  step, _ = checksums.newest_good(epath.Path(tmp_path) / 'checkpoints')
  assert f'Stopped at step {step or 0} of 7' in caplog.text
  result = train.train(config, str(tmp_path))
  assert adapter_bytes(tmp_path) == adapter_bytes(finished[0])
  assert adapter_bytes(tmp_path, 'adapter_best') == adapter_bytes(finished[0], 'adapter_best')
  timeless = lambda rows: [
    {k: v for k, v in row.items() if not k.endswith(('secs', 'per_sec'))} for row in rows
  ]
  assert timeless(metrics.read(tmp_path / 'metrics.jsonl')) == timeless(
    metrics.read(finished[0] / 'metrics.jsonl')
  )
  for name in ('steps', 'tokens', 'loss_base', 'loss_adapted', 'loss_best'):
    assert result[name] == finished[1][name], name


def test_a_run_in_an_object_store(finished, records, tmp_path):
  """Records and workdir there, stopped and resumed."""
  with gcs_toy.server():
    there = f'{gcs_toy.BUCKET}/records.jsonl'
    files.write(there, Path(records).read_bytes())
    config = run_toy.config(there).resolve()
    run = f'{gcs_toy.BUCKET}/run'
    with pytest.raises(train.Stopped):
      train.train(config, run, stop_after(5))
    result = train.train(config, run)
    assert result['steps'] == 7
    assert result['adapter'] == f'{run}/adapter'
    rows = metrics.read(f'{run}/metrics.jsonl')
    copy = files.fetch(f'{run}/adapter')
  assert [row['step'] for row in rows if 'tokens' in row] == list(range(1, 8))
  assert adapter_bytes(copy.parent) == adapter_bytes(finished[0])


def snapshot(folder):
  """Bytes and times of all files below a folder."""
  return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path(folder).rglob('*') if p.is_file()}


def test_a_finished_run_is_moved_with_its_records(finished, tmp_path):
  """The path that it names is the new one, wherever the records lie."""
  moved = tmp_path / 'moved'
  shutil.copytree(finished[0], moved)
  result = train.train(run_toy.config(run_toy.write_records(tmp_path)).resolve(), str(moved))
  assert result == {**finished[1], 'adapter': f'{moved}/adapter'}


def test_a_stopped_run_is_moved_with_its_records(finished, records, tmp_path):
  before, after = tmp_path / 'before', tmp_path / 'after'
  with pytest.raises(train.Stopped):
    train.train(run_toy.config(records).resolve(), str(before), stop_after(7))
  before.rename(after)
  train.train(run_toy.config(run_toy.write_records(tmp_path)).resolve(), str(after))
  assert adapter_bytes(after) == adapter_bytes(finished[0])


def test_a_finished_run_on_other_records_is_refused(finished, tmp_path):
  """It is not said to have finished; the way on is named."""
  config = run_toy.config(run_toy.write_records(tmp_path, count=23)).resolve()
  with pytest.raises(ValueError, match='its data had the fingerprint') as e:
    train.train(config, str(finished[0]))
  assert f'lora.path={finished[0]}/adapter starts' in str(e.value)


@pytest.fixture(scope='module')
def longer(records, tmp_path_factory):
  """Workdir of an undisturbed run of 10 steps."""
  workdir = tmp_path_factory.mktemp('longer') / 'run'
  train.train(run_toy.config(records, steps=10).resolve(), str(workdir))
  return workdir


def test_more_steps_of_a_finished_run(finished, longer, records, tmp_path):
  """Bit for bit, also when it is stopped among the new ones."""
  workdir = tmp_path / 'run'
  shutil.copytree(finished[0], workdir)
  config = run_toy.config(records, steps=10, max_skipped_batches=1).resolve()
  with pytest.raises(train.Stopped):
    train.train(config, str(workdir), stop_after(3))
  assert not (workdir / 'result.json').exists()
  result = train.train(config, str(workdir))
  assert result['steps'] == 10
  assert adapter_bytes(workdir) == adapter_bytes(longer)
  got, want = (
    {r['step']: r['loss_nats_per_token'] for r in rows if 'tokens' in r}
    for rows in (metrics.read(workdir / 'metrics.jsonl'), metrics.read(longer / 'metrics.jsonl'))
  )
  assert got == want
  with pytest.raises(ValueError, match=r'got 7, but the run in .* has done 10'):
    train.train(run_toy.config(records).resolve(), str(workdir))


def test_more_steps_need_the_checkpoint(finished, records, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(finished[0], workdir)
  shutil.rmtree(workdir / 'checkpoints')
  before = snapshot(workdir)
  train.train(run_toy.config(records).resolve(), str(workdir))
  with pytest.raises(ValueError, match='kept no checkpoint to continue from'):
    train.train(run_toy.config(records, steps=10).resolve(), str(workdir))
  assert snapshot(workdir) == before


def test_an_evaluation_at_an_earlier_end_does_not_stop_a_run_early(finished, records, tmp_path):
  """At step 7, off the schedule of every 3; it would be the second in a row."""
  run = run_lib.prepare(run_toy.config(records, steps=10, early_stopping_evals=2).resolve())
  outputs = train.RunOutputs.__new__(train.RunOutputs)
  outputs.run = run
  outputs.notes = {'evals': {'0': 3.0, '3': 2.0, '6': 2.5, '7': 2.6}}
  assert outputs.goes_on()
  outputs.notes['evals']['9'] = 2.4
  assert not outputs.goes_on()


def test_a_run_that_goes_on_with_something_else_says_so(records, tmp_path, monkeypatch, caplog):
  config = run_toy.config(records)
  with pytest.raises(train.Stopped):
    train.train(config.resolve(), str(tmp_path), stop_after(7))
  made_with = json.loads((tmp_path / 'run.json').read_text())['made_with']
  assert made_with == {
    'gemma_jax': gemma_jax.__version__,
    'jax': jax.__version__,
    'jaxlib': jaxlib.__version__,
    'mesh': 'data=1 fsdp=1 tensor=1',
  }
  with pytest.raises(train.Stopped):
    train.train(config.resolve(), str(tmp_path), stop_after(0))
  assert 'equal bits' not in caplog.text
  monkeypatch.setattr(jax, '__version__', '0.0.1')
  config.mesh.fsdp = 2
  train.train(config.resolve(), str(tmp_path))
  said = f'jax was {made_with["jax"]} and is 0.0.1, mesh was data=1 fsdp=1 tensor=1 and is '
  assert f'{said}data=1 fsdp=2 tensor=1. The run continues, but' in caplog.text
  assert 'equal bits need the same jax and mesh.' in caplog.text
  assert json.loads((tmp_path / 'run.json').read_text())['made_with']['jax'] == '0.0.1'


@pytest.mark.parametrize('content', [None, '', '{"config": {"see'])
def test_the_checkpoint_decides_and_not_run_json(finished, records, tmp_path, content):
  """Removed or cut, it lets nobody else in and does not stop the run."""
  config = run_toy.config(records)
  with pytest.raises(train.Stopped):
    train.train(config.resolve(), str(tmp_path), stop_after(7))
  (tmp_path / 'run.json').unlink()
  if content is not None:
    (tmp_path / 'run.json').write_text(content)
  other = run_toy.config(records)
  other.optimizer.learning_rate = 3e-3
  with pytest.raises(ValueError, match=r'learning_rate=0\.01, this config has'):
    train.train(other.resolve(), str(tmp_path))
  train.train(config.resolve(), str(tmp_path))
  assert adapter_bytes(tmp_path) == adapter_bytes(finished[0])
  (tmp_path / 'run.json').unlink()
  with pytest.raises(ValueError, match=r'learning_rate=0\.01, this config has'):
    train.train(other.resolve(), str(tmp_path))


def test_a_finished_run_that_says_nothing_of_itself_is_refused(finished, records, tmp_path):
  """As an earlier version left it, and then without its run.json."""
  workdir = tmp_path / 'run'
  shutil.copytree(finished[0], workdir)
  saved = json.loads((workdir / 'result.json').read_text())
  facts = saved.pop('run')
  (workdir / 'result.json').write_text(json.dumps(saved))
  config = run_toy.config(records).resolve()
  assert train.train(config, str(workdir))['steps'] == 7
  assert json.loads((workdir / 'run.json').read_text()) == facts
  (workdir / 'run.json').unlink()
  with pytest.raises(ValueError, match=r'run/run\.json: missing'):
    train.train(config, str(workdir))
  (workdir / 'result.json').write_text('{"steps": ')
  with pytest.raises(ValueError, match=r'result\.json: cut or damaged') as e:
    train.train(config, str(workdir))
  assert 'Remove it to continue from the checkpoint' in str(e.value)


def test_a_run_that_began_at_the_same_time_is_not_resumed(records, tmp_path, monkeypatch):
  """While one reads its records the other trains, and is stopped."""
  mine, other = run_toy.config(records), run_toy.config(records)
  other.optimizer.learning_rate = 3e-3
  prepare = run_lib.prepare

  def slow_prepare(config):
    monkeypatch.setattr(run_lib, 'prepare', prepare)
    with pytest.raises(train.Stopped):
      train.train(other.resolve(), str(tmp_path), stop_after(7))
    return prepare(config)

  monkeypatch.setattr(run_lib, 'prepare', slow_prepare)
  with pytest.raises(ValueError, match=r'learning_rate=0\.003, this config has'):
    train.train(mine.resolve(), str(tmp_path))


@pytest.mark.parametrize('done', ['run.json', 'checkpoints/2'])
def test_a_workdir_that_is_renamed_in_the_middle(records, tmp_path, done):
  """Another run has its place by then, and stays as it is."""
  workdir, away = tmp_path / 'run', tmp_path / 'away'
  others = []

  def should_stop():
    if (workdir / done).exists() and not others:
      workdir.rename(away)
      config = run_toy.config(records, steps=2, eval_every_steps=0)
      train.train(config.resolve(), str(workdir))
      others.append(snapshot(workdir))
    return False

  config = run_toy.config(records, checkpoint_every_steps=1)
  with pytest.raises(OSError, match='another folder is there now') as e:
    train.train(config.resolve(), str(workdir), should_stop)
  assert '\n' not in str(e.value)
  assert snapshot(workdir) == others[0]
  result = train.train(config.resolve(), str(away))
  assert result['steps'] == 7


def launch(config, workdir):
  command = [sys.executable, '-m', 'launch.train', f'--config={config}']
  return subprocess.Popen(
    [*command, f'--workdir={workdir}'],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_signal_and_the_same_command_again(records, tmp_path, number):
  """The real process, the real signal, bit-equal to one that ran through."""
  config = run_toy.config_file(
    tmp_path, records, steps=61, eval_every_steps=9, checkpoint_every_steps=5
  )
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  undisturbed = launch(config, whole)
  process = launch(config, broken)
  lines = broken / 'metrics.jsonl'
  deadline = time.monotonic() + 240
  while time.monotonic() < deadline and process.poll() is None:
    # A kill loses a save that was under way, so one must be whole.
    if checksums.steps(epath.Path(broken) / 'checkpoints') and (
      len(lines.read_text().splitlines()) >= 12
    ):
      break
    time.sleep(0.02)
  process.send_signal(number)
  _, log = process.communicate(timeout=240)
  assert process.returncode == (75 if number == signal.SIGTERM else -9), log
  assert not (broken / 'result.json').exists()

  process = launch(config, broken)
  out, log = process.communicate(timeout=240)
  assert process.returncode == 0, log
  assert 'Resumed from step' in log
  _, log = undisturbed.communicate(timeout=240)
  assert undisturbed.returncode == 0, log
  assert adapter_bytes(broken) == adapter_bytes(whole)
  assert json.loads(out.splitlines()[-1])['steps'] == 61


def test_another_config_is_refused_by_field(finished, records):
  config = run_toy.config(records)
  config.lora.rank = 4
  with pytest.raises(ValueError, match=r'lora\.rank=3, this config has 4'):
    train.train(config.resolve(), str(finished[0]))


def test_other_records_in_the_same_file_are_refused(tmp_path):
  records = run_toy.write_records(tmp_path)
  config = run_toy.config(records).resolve()
  with pytest.raises(train.Stopped):
    train.train(config, str(tmp_path / 'run'), stop_after(7))
  run_toy.write_records(tmp_path, count=23)
  with pytest.raises(ValueError, match='its data had the fingerprint'):
    train.train(config, str(tmp_path / 'run'))


def test_trained_base_leaf_is_written_beside_the_adapter(records, tmp_path):
  config = run_toy.config(records, steps=2)
  config.model.scan_layers = False
  config.trainable = ('lora/', 'params/layer_1/attn/v/w')
  config = config.resolve()
  train.train(config, str(tmp_path))
  trained = peft.read_trained_base(tmp_path / 'adapter')
  source = run_lib.prepare(config).base.source
  before = source.load_params('float32', scan_layers=False)
  change = trained['layer_1']['attn']['v']['w'] - np.asarray(before['layer_1']['attn']['v']['w'])
  assert jax.tree.leaves(jax.tree.map(np.shape, trained)) != []
  assert list(trained) == ['layer_1']
  assert np.abs(change).max() > 0


def test_early_stopping(records, tmp_path, caplog):
  caplog.set_level('INFO')
  config = run_toy.config(records, steps=50, early_stopping_evals=2)
  config.optimizer.learning_rate = 3.0  # learns nothing but noise
  result = train.train(config.resolve(), str(tmp_path))
  assert result['steps'] < 50
  # Said once, for all steps that are planned.
  (said,) = [text for text in caplog.messages if text.startswith('An evaluation takes about')]
  assert '18 of them take' in said
  assert 'of the time of 50 updates' in said


def test_a_loss_that_is_not_finite_stops_the_run(records, tmp_path):
  config = run_toy.config(records, steps=30)
  config.optimizer.learning_rate = 1e30
  config.optimizer.clip_norm = 0.0
  with pytest.raises(
    FloatingPointError, match=r'at step \d \(learning rate 1e\+30; training records \d'
  ):
    train.train(config.resolve(), str(tmp_path))
  assert not (tmp_path / 'adapter').exists()


def test_one_bad_batch_is_skipped_and_a_resumed_run_knows(records, tmp_path, monkeypatch):
  original = trainer.pipeline.train_batches

  def poisoned(*arguments):
    for step, batch in original(*arguments):
      if step == 3:
        # A sum of losses that float32 cannot hold.
        weights = np.array(batch['weights'])
        weights.flat[np.argmax(weights)] = 3e38
        where = batch['weights'].sharding
        batch = {**batch, 'weights': jax.device_put(weights, where)}
      yield step, batch

  monkeypatch.setattr(trainer.pipeline, 'train_batches', poisoned)
  config = run_toy.config(records, max_skipped_batches=1).resolve()
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  result = train.train(config, str(whole))
  assert result['steps'] == 7
  assert np.isfinite(result['loss_adapted'])
  with pytest.raises(train.Stopped):
    train.train(config, str(broken), stop_after(9))
  train.train(config, str(broken))
  assert adapter_bytes(broken) == adapter_bytes(whole)
  for workdir in (whole, broken):
    rows = metrics.read(workdir / 'metrics.jsonl')
    assert [r['step'] for r in rows if 'skipped_updates' in r] == [4]


def test_one_compilation_of_each_step(records, tmp_path, monkeypatch):
  compiled = []
  original = Program._compile

  def counting(self, name, *arguments):
    compiled.append(name)
    return original(self, name, *arguments)

  monkeypatch.setattr(Program, '_compile', counting)
  with jax.log_compiles(False):
    train.train(run_toy.config(records).resolve(), str(tmp_path))
  assert sorted(compiled) == ['evaluation step', 'training step']


def test_a_profile_is_written_also_at_the_end(records, tmp_path):
  config = run_toy.config(records, steps=2, profile_steps=(1,)).resolve()
  train.train(config, str(tmp_path))
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


@pytest.fixture(scope='module')
def dora(records, tmp_path_factory):
  """(workdir, result) of a DoRA run whose ranks differ between layers."""
  workdir = tmp_path_factory.mktemp('dora') / 'run'
  config = run_toy.config(records, steps=2, eval_every_steps=0)
  config.lora = LoraConfig(rank=3, alpha=5.0, targets='q|up', dora=True, ranks={'layer_0/.*': 2})
  return workdir, train.train(config.resolve(), str(workdir))


def test_a_run_starts_from_an_adapter(dora, records, tmp_path):
  """Where another ended, with its rank, targets and magnitudes."""
  workdir, result = dora
  config = run_toy.config(records, steps=1, eval_every_steps=0)
  config.lora.path = str(workdir / 'adapter')
  again = train.train(config.resolve(), str(tmp_path / 'run'))
  np.testing.assert_allclose(again['loss_base'], result['loss_adapted'], rtol=1e-6)
  assert again['loss_adapted'] != again['loss_base']
  model = variants.get('tiny3')
  before, _ = peft.read_adapter(workdir / 'adapter', model)
  after, factors = peft.read_adapter(tmp_path / 'run' / 'adapter', model)
  assert after.dora and after.target_names == ('q', 'up')
  assert after.ranks == before.ranks and after.scale == before.scale
  m = factors['layers']['attn']['q']['lora_magnitude']
  assert np.all(m > 0) and np.std(m) > 0
  # The same command again: a finished run, whatever the adapter holds now.
  assert train.train(config.resolve(), str(tmp_path / 'run')) == again


def test_a_run_starts_from_an_adapter_that_peft_made(tmp_path):
  """On its base, which has no tokenizer; the records are tokens."""
  base = hf_toy.PARITY / 'gemma3'
  rng = np.random.default_rng(0)
  with (tmp_path / 'data.jsonl').open('w') as f:
    for _ in range(20):
      tokens = [2, *rng.integers(4, 60, 9).tolist()]
      f.write(json.dumps({'tokens': tokens, 'loss_mask': [0] * 5 + [1] * 5}))
      f.write('\n')
  config = run_toy.config(str(tmp_path / 'data.jsonl'), steps=2)
  config.model.path = str(base)
  config.lora.path = str(base / 'adapter_all')
  result = train.train(config.resolve(), str(tmp_path / 'run'))
  assert result['loss_adapted'] != result['loss_base']
  source_ = open_base.open_base(str(base))
  before, old = peft.read_adapter(base / 'adapter_all', source_.config)
  after, new = peft.read_adapter(tmp_path / 'run' / 'adapter', source_.config)
  assert (after.rank, after.scale, after.targets) == (4, 2.0, 'all')
  assert before.scale == after.scale
  for name, x in pytree.items(new):
    moved = np.abs(x - dict(pytree.items(old))[name]).max()
    assert 0 < moved < 0.1, name


@pytest.mark.parametrize('dora', [False, True])
def test_a_run_starts_from_a_wide_adapter_on_some_layers(dora, records, tmp_path):
  """A rank beyond the matrix's smaller side; layer 1 stays without one."""
  model = variants.get('tiny3')
  lora = LoraConfig(rank=20, targets='q|v', dora=dora)
  factors = jax.tree.map(lambda x: np.abs(x) * np.float32(0.02), peft_toy.make_lora(model, lora))
  for leaf in jax.tree.leaves(factors):
    leaf[1] = 0
  peft.write_adapter(tmp_path / 'start', factors, lora, 'b')
  config = run_toy.config(records, steps=2, eval_every_steps=0)
  config.lora.path = str(tmp_path / 'start')
  result = train.train(config.resolve(), str(tmp_path / 'run'))
  assert result['loss_adapted'] < result['loss_base']
  after, trained = peft.read_adapter(tmp_path / 'run' / 'adapter', model)
  assert (after.rank, after.target_names) == (20, ('q', 'v'))
  old = dict(pytree.items(factors))
  for name, x in pytree.items(trained):
    assert not x[1].any(), name
    assert all(np.any(x[i] != old[name][i]) for i in (0, 2)), name
  raw = json.loads((tmp_path / 'run' / 'adapter' / peft.CONFIG_NAME).read_text())
  assert 'model.layers.2.self_attn.v_proj' in raw['target_modules']
  assert not any('layers.1.' in name for name in raw['target_modules'])


def test_an_adapter_of_another_base_is_no_start(dora, records, tmp_path):
  config = run_toy.config(records)
  config.model.path = 'random:tiny2'
  config.lora.path = str(dora[0] / 'adapter')
  with pytest.raises(ValueError, match='adapter belongs to another base'):
    run_lib.prepare(config.resolve())
  with pytest.raises(ValueError, match=r"adapter: got '.*none', which is nei"):
    config.lora.path = str(tmp_path / 'none')
    run_lib.prepare(config.resolve())
