"""A folder appears whole or not at all, whatever dies in between."""

import os
import signal
import subprocess
import sys

import pytest

from gemma_jax import temporary
from gemma_jax.formats import atomic_folder


def write(folder, text):
  atomic_folder.replace(folder, lambda f: (f / 'a.txt').write_text(text))


def read(folder):
  return {path.name: path.read_text() for path in folder.iterdir()}


def test_replaced_folder_leaves_nothing_behind(tmp_path):
  folder = tmp_path / 'deep' / 'adapter'
  write(folder, 'first')
  (folder / 'b.txt').write_text('of the first')
  write(folder, 'second')
  assert read(folder) == {'a.txt': 'second'}
  assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(
  ('name', 'count'), [('fsync', 1), ('fsync', 2), ('rename', 1), ('rename', 2)]
)
def test_failure_keeps_the_old_folder(name, count, tmp_path, monkeypatch):
  folder = tmp_path / 'adapter'
  write(folder, 'first')
  real, calls = getattr(os, name), []

  def fail(*args):
    calls.append(args)
    if len(calls) == count:
      raise OSError('disk full')
    return real(*args)

  with monkeypatch.context() as patch:
    patch.setattr(os, name, fail)
    with pytest.raises(OSError, match='disk full'):
      write(folder, 'second')
  assert read(folder) == {'a.txt': 'first'}
  assert list(tmp_path.iterdir()) == [folder]


def test_killed_writer_is_cleaned_up_after(tmp_path):
  """Killed between its two renames, then once more while it fills."""
  folder = tmp_path / 'adapter'
  write(folder, 'first')
  os.rename(folder, temporary.name(folder, temporary.OLD))
  half = temporary.name(folder, temporary.NEW)
  half.mkdir()
  (half / 'half.txt').write_text('ha')

  def killed(new):
    assert list(new.iterdir()) == []
    assert read(folder) == {'a.txt': 'first'}
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    atomic_folder.replace(folder, killed)
  write(folder, 'second')
  assert read(folder) == {'a.txt': 'second'}
  assert list(tmp_path.iterdir()) == [folder]


def test_folders_of_similar_names_are_somebodys(tmp_path):
  folder = tmp_path / 'adapter'
  ours = temporary.name(folder, temporary.NEW).name
  of_another = temporary.name(tmp_path / 'other', temporary.NEW).name
  names = (
    *('.adapter.old', '.adapter.new', '.adapter.backup.old', '.adapter.0123.old'),
    # As git and others write digits.
    *(f'.adapter.{"0123456789abcdef" * n}{rest}' for n in (1, 2) for rest in ('.old', '.new')),
    *(f'.adapter.{"0123456789abcdef01234567"}.{kind}' for kind in ('old', 'new')),
    ours.replace(ours[9:13], 'beef'),
    of_another.replace('other', 'adapter'),
  )
  for name in names:
    (tmp_path / name).mkdir()
    (tmp_path / name / 'mine.txt').write_text('mine')
  for text in ('first', 'second'):
    write(folder, text)
  assert {path.name for path in tmp_path.iterdir()} == {'adapter', *names}
  assert all((tmp_path / name / 'mine.txt').is_file() for name in names)


def test_folder_is_flushed_before_it_appears(tmp_path, monkeypatch):
  events = []
  flush, rename = os.fsync, os.rename
  monkeypatch.setattr(os, 'fsync', lambda f: (events.append('fsync'), flush(f)))
  monkeypatch.setattr(os, 'rename', lambda *a: (events.append('rename'), rename(*a)))
  write(tmp_path / 'adapter', 'first')
  # The file, its folder, then the name, then the folder that holds the name.
  assert events == ['fsync', 'fsync', 'rename', 'fsync']


def test_second_writer_is_refused_and_the_first_one_goes_on(tmp_path):
  folder = tmp_path / 'adapter'

  def fill(new):
    (new / 'a.txt').write_text('first')
    with pytest.raises(BlockingIOError, match='another process is writing it'):
      write(folder, 'second')

  atomic_folder.replace(folder, fill)
  assert read(folder) == {'a.txt': 'first'}
  assert list(tmp_path.iterdir()) == [folder]


KILLED = """
import os, pathlib, signal, sys
from gemma_jax.formats import atomic_folder

folder, number, when = sys.argv[1], int(sys.argv[2]), sys.argv[3]
rename, calls = os.rename, []

def killing(*names):
  calls.append(names)
  if len(calls) == number and when == 'before':
    os.kill(os.getpid(), signal.SIGKILL)
  rename(*names)
  if len(calls) == number:
    os.kill(os.getpid(), signal.SIGKILL)

os.rename = killing
atomic_folder.replace(folder, lambda f: (f / 'a.txt').write_text('second'))
"""


@pytest.mark.parametrize('when', ['before', 'after'])
@pytest.mark.parametrize('number', [1, 2, 3])
def test_kill_9_at_each_rename(tmp_path, number, when):
  """Old aside, new in place, old about to go: one whole folder each time."""
  folder = tmp_path / 'adapter'
  write(folder, 'first')
  done = subprocess.run([sys.executable, '-c', KILLED, str(folder), str(number), when], check=False)
  assert done.returncode == -signal.SIGKILL
  is_second = (number, when) in ((2, 'after'), (3, 'before'), (3, 'after'))

  def fails(_):
    assert read(folder) == {'a.txt': 'second' if is_second else 'first'}
    raise RuntimeError

  with pytest.raises(RuntimeError):
    atomic_folder.replace(folder, fails)
  assert read(folder) == {'a.txt': 'second' if is_second else 'first'}
  assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize('is_there', [True, False])
@pytest.mark.parametrize('has_token', [False, True])
@pytest.mark.parametrize('kind', ['new', 'old'])
def test_a_planted_link_loses_nothing(tmp_path, kind, has_token, is_there):
  folder = tmp_path / 'adapter'
  victim = tmp_path / 'victim'
  victim.mkdir()
  (victim / 'a.txt').write_text('precious')
  link = temporary.name(folder, kind) if has_token else tmp_path / f'.adapter.{kind}'
  link.symlink_to(victim)
  if is_there:
    write(folder, 'first')
  write(folder, 'second')
  assert read(folder) == {'a.txt': 'second'}
  assert not folder.is_symlink()
  assert read(victim) == {'a.txt': 'precious'}
  assert link.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason='only root gives files away')
@pytest.mark.parametrize('kind', ['new', 'old'])
def test_a_folder_of_another_user_is_neither_removed_nor_put_back(tmp_path, kind):
  other = temporary.name(tmp_path / 'adapter', kind)
  other.mkdir()
  (other / 'a.txt').write_text('not ours')
  os.chown(other, 12345, -1)
  write(tmp_path / 'adapter', 'first')
  assert read(tmp_path / 'adapter') == {'a.txt': 'first'}
  assert read(other) == {'a.txt': 'not ours'}


def test_nobody_else_can_write_while_it_is_filled(tmp_path):
  before = os.umask(0)
  try:
    atomic_folder.replace(
      tmp_path / 'adapter', lambda new: (new / str(new.stat().st_mode & 0o777)).touch()
    )
  finally:
    os.umask(before)
  assert [p.name for p in (tmp_path / 'adapter').iterdir()] == [str(0o700)]
  assert (tmp_path / 'adapter').stat().st_mode & 0o777 == 0o777
