"""What a workdir remembers of its run, and which changes it accepts."""

import errno
import os
from pathlib import Path
import re

import pytest

from gemma_jax import workdir
from tests import run_toy


@pytest.fixture
def made(tmp_path):
  """A workdir with the facts of a run."""
  config = run_toy.config('records.jsonl').resolve()
  facts = workdir.facts(
    config, 7, {'base': 'aa', 'tokenizer': 'b', 'data': 'c'}
  )
  workdir.write_json(str(tmp_path), 'run.json', facts)
  (tmp_path / 'checkpoints' / '4').mkdir(parents=True)
  return str(tmp_path)


def test_the_same_config_is_accepted(made):
  workdir.check_same_config(made, run_toy.config('records.jsonl').resolve())


@pytest.mark.parametrize(
  ('section', 'field', 'value'),
  [
    ('', 'log_every_steps', 3),
    ('', 'checkpoint_every_steps', 11),
    ('', 'profile_steps', (2,)),
    ('mesh', 'data', 2),
    ('model', 'remat', 'full'),
  ],
)
def test_fields_that_change_nothing_learnt_may_change(
  made, section, field, value
):
  config = run_toy.config('records.jsonl')
  setattr(getattr(config, section) if section else config, field, value)
  workdir.check_same_config(made, config.resolve())


@pytest.mark.parametrize(
  ('section', 'field', 'value'),
  [
    ('', 'seed', 5),
    ('', 'trainable', ('lora/layers/attn/q',)),
    ('model', 'path', 'random:tiny2'),
    ('optimizer', 'learning_rate', 0.5),
    ('data', 'seq_len', 64),
  ],
)
def test_other_fields_may_not(made, section, field, value):
  config = run_toy.config('records.jsonl')
  setattr(getattr(config, section) if section else config, field, value)
  name = f'{section}.{field}' if section else field
  with pytest.raises(ValueError, match=re.escape(f'was made with {name}=')):
    workdir.check_same_config(made, config.resolve())


def test_another_base_is_refused_with_both_values(made):
  with pytest.raises(ValueError, match=r'base had the fingerprint aa.* has zz'):
    workdir.check_same_fingerprints(
      made, {'base': 'zz', 'tokenizer': 'b', 'data': 'c'}
    )


def test_an_empty_workdir_accepts_everything(tmp_path):
  workdir.check_same_config(str(tmp_path), run_toy.config('x').resolve())
  workdir.check_same_fingerprints(str(tmp_path), {'base': 'zz'})


def test_a_run_that_saved_nothing_may_be_changed(made):
  """Its first loss was not finite, say, and the remedy is another rate."""
  (Path(made) / 'checkpoints' / '4').rmdir()
  config = run_toy.config('records.jsonl')
  config.optimizer.learning_rate = 0.5
  workdir.check_same_config(made, config.resolve())


def test_writable_is_checked_without_writing(tmp_path):
  workdir.check_writable(str(tmp_path / 'a' / 'b'))
  assert not list(tmp_path.iterdir())
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match=r'workdir: got .*not a folder'):
    workdir.check_writable(str(tmp_path / 'file' / 'run'))


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_read_only_parent_is_refused(tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(ValueError, match='can be written to'):
    workdir.check_writable(str(tmp_path / 'run'))


@pytest.mark.parametrize(
  ('failure', 'words'),
  [
    (lambda at: OSError(errno.ENOSPC, 'x'), 'No space left on device'),
    (
      lambda at: RuntimeError('I/O: No space left on device (os error 28)'),
      'No space left on device',
    ),
    (
      lambda at: ValueError(f'{at}/a: Read-only file system'),
      'Read-only file system',
    ),
    (lambda at: OSError(errno.EIO, 'x', f'{at}/a'), 'Input/output error'),
  ],
)
def test_trouble_with_the_disk_is_one_line(made, failure, words):
  found = str(workdir.disk_error(made, failure(made)))
  assert found.startswith(f'workdir {made}: {words}. It keeps the checkpoint ')
  assert found.endswith('run the same command again.')


def test_a_workdir_that_is_gone_is_said(made):
  found = workdir.disk_error(f'{made}/gone', ValueError('NOT_FOUND: a file'))
  assert 'No such file or directory. It keeps no checkpoint' in str(found)


def test_other_failures_are_not_the_disks(made):
  elsewhere = OSError(errno.ENOENT, 'x', '/elsewhere/data.jsonl')
  assert workdir.disk_error(made, elsewhere) is None
  assert workdir.disk_error(made, ValueError('lora.rank: got 0')) is None


def test_held_out_losses_round_trip(tmp_path):
  workdir.write_heldout(str(tmp_path), 3, [5, 2], [1.5, 0.25], [7, 1])
  assert workdir.read_heldout(str(tmp_path), 3) == [
    {'index': 5, 'nll': 1.5, 'tokens': 7},
    {'index': 2, 'nll': 0.25, 'tokens': 1},
  ]
  assert [p.name for p in (tmp_path / 'heldout').iterdir()] == ['step_3.jsonl']


def test_one_run_at_a_time(tmp_path):
  folder = str(tmp_path / 'new')
  with workdir.only_run(folder):
    with (
      pytest.raises(ValueError, match='another process is training in it'),
      workdir.only_run(folder),
    ):
      pass
    with workdir.only_run(str(tmp_path / 'other')):
      pass
  with pytest.raises(ZeroDivisionError), workdir.only_run(folder):
    raise ZeroDivisionError
  with workdir.only_run(folder):
    assert os.listdir(folder) == []


def test_a_disk_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
  def flock(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr('fcntl.flock', flock)
  with workdir.only_run(str(tmp_path)), workdir.only_run(str(tmp_path)):
    assert tmp_path.is_dir()
