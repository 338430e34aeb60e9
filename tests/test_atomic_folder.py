"""A folder appears whole or not at all, whatever dies in between."""

import os

import pytest

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
  os.rename(folder, tmp_path / '.adapter.old')
  (tmp_path / '.adapter.new').mkdir()
  (tmp_path / '.adapter.new' / 'half.txt').write_text('ha')

  def killed(new):
    assert list(new.iterdir()) == []
    assert read(folder) == {'a.txt': 'first'}
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    atomic_folder.replace(folder, killed)
  write(folder, 'second')
  assert read(folder) == {'a.txt': 'second'}
  assert list(tmp_path.iterdir()) == [folder]


def test_folder_is_flushed_before_it_appears(tmp_path, monkeypatch):
  events = []
  flush, rename = os.fsync, os.rename
  monkeypatch.setattr(os, 'fsync', lambda f: (events.append('fsync'), flush(f)))
  monkeypatch.setattr(
    os, 'rename', lambda *a: (events.append('rename'), rename(*a))
  )
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
