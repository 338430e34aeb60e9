"""What a run leaves in its workdir, and who may write there."""

import errno
import os

import pytest

from gemma_jax.runs import workdir


@pytest.fixture
def made(tmp_path):
  """A workdir with a checkpoint."""
  (tmp_path / 'checkpoints' / '4').mkdir(parents=True)
  return str(tmp_path)


@pytest.mark.parametrize('content', ['{"a": ', '[1]', '', '\x00' * 40])
def test_a_damaged_json_file_is_named_with_a_remedy(tmp_path, content):
  (tmp_path / 'run.json').write_text(content)
  with pytest.raises(ValueError, match=r'/run\.json: .*Do this\.$') as e:
    workdir.read_json(str(tmp_path), 'run.json', 'Do this.')
  assert '\n' not in str(e.value)


def test_writable_is_checked_without_writing(tmp_path):
  workdir.check_writable(str(tmp_path / 'a' / 'b'))
  assert not list(tmp_path.iterdir())
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match=r'workdir: got .*not a writable folder'):
    workdir.check_writable(str(tmp_path / 'file' / 'run'))


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_read_only_parent_is_refused(tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(ValueError, match='not a writable folder'):
    workdir.check_writable(str(tmp_path / 'run'))


@pytest.mark.parametrize(
  ('failure', 'words'),
  [
    (lambda at: OSError(errno.ENOSPC, 'x'), 'No space left on device'),
    (
      lambda at: RuntimeError('I/O: No space left on device (os error 28)'),
      'No space left on device',
    ),
    (lambda at: ValueError(f'{at}/a: Read-only file system'), 'Read-only file system'),
    (lambda at: OSError(errno.EIO, 'x', f'{at}/a'), 'Input/output error'),
  ],
)
def test_trouble_with_the_disk_is_one_line(made, failure, words):
  with pytest.raises(workdir.DiskError) as e, workdir.naming_disk_errors(made):
    raise failure(made)
  assert str(e.value).startswith(f'workdir {made}: {words}. It keeps the checkpoint ')
  assert str(e.value).endswith('run the same command again.')


def test_a_workdir_that_is_gone_is_said(made):
  words = 'No such file or directory. It keeps no checkpoint'
  with pytest.raises(workdir.DiskError, match=words), workdir.naming_disk_errors(f'{made}/gone'):
    raise ValueError('NOT_FOUND: a file')


@pytest.mark.parametrize(
  'failure',
  [
    OSError(errno.ENOENT, 'x', '/elsewhere/data.jsonl'),
    ValueError('lora.rank: got 0'),
    workdir.Moved(f'workdir a: was renamed {os.strerror(errno.ENOSPC)}'),
    workdir.DiskError(f'workdir a/jobs/b: {os.strerror(errno.ENOSPC)}'),
  ],
)
def test_other_failures_are_not_the_disks(made, failure):
  """Nor are those that are said already."""
  with pytest.raises(type(failure)) as e, workdir.naming_disk_errors(made):
    raise failure
  assert e.value is failure


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


def test_a_folder_that_was_renamed_is_not_written_to(tmp_path):
  folder, away = tmp_path / 'run', tmp_path / 'away'
  with workdir.only_run(str(folder)) as place:
    place.check()
    folder.rename(away)
    with pytest.raises(workdir.Moved, match='was renamed while a run'):
      place.check()
    folder.mkdir()
    with pytest.raises(workdir.Moved, match='another folder is there now'):
      place.check()
    folder.rmdir()
    away.rename(folder)
    place.check()
    folder.rmdir()
    with pytest.raises(FileNotFoundError):
      place.check()


def test_a_disk_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
  def flock(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr('fcntl.flock', flock)
  with workdir.only_run(str(tmp_path)), workdir.only_run(str(tmp_path)):
    assert tmp_path.is_dir()
