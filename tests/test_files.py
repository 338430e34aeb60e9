"""Files whole or not at all, on this machine and in an object store."""

import ast
import gzip
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys

import pytest

from gemma_jax import files, temporary
from gemma_jax.data import records
from gemma_jax.formats import atomic_folder
from gemma_jax.runs import metrics, workdir
from tests import gcs_toy

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def bucket():
  with gcs_toy.server():
    yield gcs_toy.BUCKET


@pytest.fixture(params=['local', 'remote'])
def root(request, tmp_path):
  """A folder of either kind, as a string."""
  if request.param == 'local':
    return str(tmp_path)
  return f'{request.getfixturevalue("bucket")}/{tmp_path.name}'


def names(root):
  """Paths of the files below a folder, relative to it."""
  if not files.is_remote(root):
    found = [str(p) for p in Path(root).rglob('*') if p.is_file()]
  else:
    from fsspec.core import url_to_fs

    store, root = url_to_fs(root)
    found = store.find(root)
  return sorted(os.path.relpath(path, root) for path in found)


def test_write_then_read(root):
  files.write(f'{root}/a/b.txt', 'first')
  files.write(f'{root}/a/b.txt', b'second \xea\xb0\x80')
  assert files.path(f'{root}/a/b.txt').read_text() == 'second 가'
  assert names(root) == ['a/b.txt']


@pytest.mark.parametrize('suffix', ['', '.gz'])
def test_records_are_read_from_either(root, suffix):
  rows = [{'prompt': f'가 {i}', 'response': 'r' * i} for i in range(7)]
  text = ''.join(json.dumps(row) + '\n' for row in rows).encode()
  path = f'{root}/records.jsonl{suffix}'
  files.write(path, gzip.compress(text) if suffix else text)
  assert [row for _, row in records.read_jsonl(path)] == rows


def test_json_and_json_lines(root):
  files.write_json(f'{root}/one.json', {'a': 7})
  files.write_json_lines(f'{root}/two.jsonl', [{'b': '가'}, {'b': 3}])
  assert json.loads(files.path(f'{root}/one.json').read_text()) == {'a': 7}
  text = files.path(f'{root}/two.jsonl').read_text()
  assert text == '{"b": "가"}\n{"b": 3}\n'


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), float('-inf')])
def test_no_json_says_what_json_cannot(bad, tmp_path):
  writer = metrics.MetricsWriter(str(tmp_path / 'run'), 0)
  writer.write(1, {'loss_nats_per_token': 2.5})
  value = {'a': 1.5, 'b': {'c': [None, 2, bad]}}
  place = rf'b\.c\[2\] is {bad}, expected a finite number'
  for path, write in (
    ('one.json', lambda: files.write_json(tmp_path / 'one.json', value)),
    ('two.jsonl, line 2', lambda: files.write_json_lines(tmp_path / 'two.jsonl', [{}, value])),
    ('one.json', lambda: workdir.write_json(str(tmp_path), 'one.json', value)),
  ):
    with pytest.raises(ValueError, match=rf'{path}: {place}'):
      write()
  with pytest.raises(ValueError, match=r'metrics\.jsonl, step 2: grad_norm is'):
    writer.write(2, {'loss_nats_per_token': 2.0, 'grad_norm': bad})
  writer.close()
  assert metrics.read(tmp_path / 'run' / 'metrics.jsonl') == [
    {'step': 1, 'loss_nats_per_token': 2.5}
  ]
  assert names(tmp_path)[0] == 'run/metrics.jsonl'
  assert files.to_json({'missing': None}) == '{"missing": null}'


def test_one_function_makes_all_json():
  """Others make keys and digests of it, which nobody reads."""
  of_keys = {'config/train.py', 'data/record.py', 'runs/hosts.py', 'sweep/plan.py'}
  made_by = {
    str(path.relative_to(ROOT / room))
    for room in ('gemma_jax', 'launch')
    for path in (ROOT / room).rglob('*.py')
    if re.search(r'\bjson\.dumps?\(', path.read_text('utf-8'))
  }
  assert made_by == {'files.py', *of_keys}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'a.txt'
  files.write(path, 'old')

  def full(_):
    raise OSError('disk full')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError, match='disk full'):
    files.write(path, 'new')
  assert path.read_text() == 'old'
  assert list(tmp_path.iterdir()) == [path]


TOKEN = '0123456789abcdef'


@pytest.mark.parametrize('is_guessed', [False, True])
def test_a_planted_link_is_neither_followed_nor_removed(tmp_path, monkeypatch, is_guessed):
  """The second one stands where the writer wanted to make its own."""
  tokens = iter((TOKEN, TOKEN, 'f' * 16))
  monkeypatch.setattr('secrets.token_hex', lambda _: next(tokens))
  made = temporary.name(tmp_path / 'a.txt', temporary.FILE)
  victim, link = tmp_path / 'victim', made if is_guessed else tmp_path / '.a.txt.tmp'
  victim.write_text('precious')
  link.symlink_to(victim)
  files.write(tmp_path / 'a.txt', 'new')
  assert victim.read_text() == 'precious'
  assert link.is_symlink()
  assert not (tmp_path / 'a.txt').is_symlink()


def test_what_a_killed_writer_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path):
  """Killed for real, in the middle; one of another user stays as well."""
  path = tmp_path / 'a.txt'
  code = (
    'import os, signal\nfrom gemma_jax import files\n'
    'os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n'
    f'files.write({str(path)!r}, "half")'
  )
  done = subprocess.run([sys.executable, '-c', code], check=False)
  assert done.returncode == -9
  (left,) = tmp_path.iterdir()
  assert temporary.is_temporary(left.name, 'a.txt', temporary.FILE)
  foreign = temporary.name(path, temporary.FILE)
  foreign.write_text('')
  alike = tmp_path / f'.a.txt.{TOKEN}.tmp'  # a user's own
  alike.write_text('mine')
  kept = [alike]
  if os.geteuid() == 0:
    os.chown(foreign, 12345, -1)
    kept.append(foreign)

  with temporary.file(path) as (new, f):
    files.write(path, 'second')
    assert not left.exists()
    f.write(b'first, but later')
    f.flush()
    os.replace(new, path)
  assert path.read_text() == 'first, but later'
  assert set(tmp_path.iterdir()) == {path, *kept}


def test_permissions_are_those_of_the_umask(tmp_path):
  before = os.umask(0o027)
  try:
    files.write(tmp_path / 'a.txt', '')
    atomic_folder.replace(tmp_path / 'b', lambda new: (new / 'c').write_text(''))
  finally:
    os.umask(before)
  modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.rglob('*')}
  assert modes == {'a.txt': 0o640, 'b': 0o750, 'c': 0o640}


SEPARATORS = 'a\u2028b\u2029c\x85d\x0be'


def test_json_lines_end_at_a_newline_alone(root):
  rows = [{'b': SEPARATORS}, {'b': '가'}]
  files.write_json_lines(f'{root}/rows.jsonl', rows)
  assert files.read_json_lines(f'{root}/rows.jsonl') == rows
  files.write(f'{root}/torn.jsonl', '{"b": 1}\n\n{"b":')
  with pytest.raises(ValueError, match=r'torn\.jsonl, line 3: not JSON'):
    files.read_json_lines(f'{root}/torn.jsonl')
  files.write(f'{root}/latin', 'é'.encode('latin-1'))
  with pytest.raises(ValueError, match=r'latin: not UTF-8 text'):
    files.read_text(f'{root}/latin')


def test_a_folder_is_replaced_whole(root):
  def fill(*items):
    def write(new):
      for name in items:
        (new / name).parent.mkdir(exist_ok=True)
        (new / name).write_text(name)

    return write

  folder = f'{root}/adapter'
  atomic_folder.replace(folder, fill('config.json', 'old.txt', 'in/a'))
  atomic_folder.replace(folder, fill('config.json', 'new.txt', 'in/b'))
  assert names(folder) == ['config.json', 'in/b', 'new.txt']
  with pytest.raises(RuntimeError):
    atomic_folder.replace(folder, lambda new: exec('raise RuntimeError'))
  assert names(folder) == ['config.json', 'in/b', 'new.txt']


def test_a_copy_is_fetched_once_and_again_when_it_changed(bucket, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  files.write(f'{bucket}/model/config.json', '1')
  files.write(f'{bucket}/model/in/weights', 'abc')
  copy = files.fetch(f'{bucket}/model')
  assert names(copy) == ['config.json', 'in/weights']
  assert (copy / 'in/weights').read_text() == 'abc'
  before = (copy / 'config.json').stat().st_mtime_ns
  assert files.fetch(f'{bucket}/model') == copy
  assert (copy / 'config.json').stat().st_mtime_ns == before

  files.write(f'{bucket}/model/config.json', '2')
  changed = files.fetch(f'{bucket}/model')
  assert (changed / 'config.json').read_text() == '2'
  one = files.fetch(f'{bucket}/model/in/weights')
  assert (one.name, one.read_text()) == ('weights', 'abc')
  assert not files.fetch(f'{bucket}/nothing').exists()


def test_two_processes_that_fetch_the_same_both_have_it(bucket, tmp_path, monkeypatch):
  """The other one ends between any check and the rename; one more was killed."""
  monkeypatch.setenv('HOME', str(tmp_path))
  files.write(f'{bucket}/raced/config.json', '1')
  rename, left = os.rename, []

  def overtaken(new, kept):
    shutil.copytree(new, kept)
    left.append(temporary.name(Path(kept), temporary.NEW))
    left[0].mkdir()
    rename(new, kept)

  monkeypatch.setattr(os, 'rename', overtaken)
  copy = files.fetch(f'{bucket}/raced')
  assert names(copy) == ['config.json']
  monkeypatch.undo()
  monkeypatch.setenv('HOME', str(tmp_path))
  shutil.rmtree(copy.parent)
  assert files.fetch(f'{bucket}/raced') == copy
  assert list(copy.parent.parent.iterdir()) == [copy.parent]


def test_a_local_path_is_its_own_copy(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert files.fetch('~/model') == tmp_path / 'model'


@pytest.mark.parametrize('name', ['s3://bucket/x', 'foo://x'])
def test_other_stores_are_refused(name):
  with pytest.raises(ValueError, match=f'path: got {name}, expected gs://'):
    files.path(name)


def test_a_missing_bucket_is_named(bucket):
  del bucket
  workdir.check_writable('gs://toys/run')
  with pytest.raises(ValueError, match='there is no bucket other'):
    workdir.check_writable('gs://other/run')


def test_metrics_grow_in_a_store_that_cannot_append(bucket):
  run = f'{bucket}/metrics'
  writer = metrics.MetricsWriter(run, 0)
  writer.write(1, {'loss_nats_per_token': 2.5})
  writer.write(2, {'loss_nats_per_token': 2.25})
  writer.flush()  # as before a checkpoint
  writer.write(3, {'loss_nats_per_token': 2.0})
  rows = metrics.read(f'{run}/metrics.jsonl')
  assert [row['step'] for row in rows] == [1, 2]
  writer.close()
  rows = metrics.read(f'{run}/metrics.jsonl')
  assert [row['step'] for row in rows] == [1, 2, 3]

  metrics.MetricsWriter(run, 2).close()  # a resumed run
  rows = metrics.read(f'{run}/metrics.jsonl')
  assert [row['step'] for row in rows] == [1, 2]
  found = names(run)
  assert found[0] == 'metrics.jsonl'
  assert {name.split('/')[0] for name in found[1:]} == {'tensorboard'}


def unspecified(node):
  """What is wrong with how a call reads or writes text, '' if nothing."""
  name = ast.unparse(node.func)
  last = name.rpartition('.')[2]
  values = [a.value for a in node.args if isinstance(a, ast.Constant)]
  has_encoding = any(k.arg == 'encoding' for k in node.keywords)
  if last == 'splitlines' and 'read_text' in name:
    return 'splits at U+2028'
  is_text = any(ast.unparse(k) == 'text=True' for k in node.keywords)
  if is_text and not has_encoding:
    return 'text without an encoding'
  least = {'read_text': 1, 'write_text': 2}.get(last)
  if least is not None and not name.startswith('files.'):
    return '' if has_encoding or len(node.args) >= least else 'no encoding'
  if name in ('open', 'os.fdopen') or (last == 'open' and 'path' in name):
    is_binary = any(isinstance(x, str) and 'b' in x for x in values)
    return '' if has_encoding or is_binary else 'no encoding'
  return ''


def test_text_is_read_and_written_with_an_encoding():
  """The locale decides nothing, and a line ends at a newline alone."""
  paths = [
    path for name in ('gemma_jax', 'launch', 'experiments') for path in (ROOT / name).rglob('*.py')
  ]
  assert len(paths) > 100
  for path in paths:
    for node in ast.walk(ast.parse(path.read_text('utf-8'))):
      if isinstance(node, ast.Call):
        wrong = unspecified(node)
        assert not wrong, f'{path}:{node.lineno}: {wrong}'
  for text in ('open(p)', 'p.read_text()', 'p.write_text(x)', 'f(text=True)'):
    assert unspecified(ast.parse(text, mode='eval').body), text
