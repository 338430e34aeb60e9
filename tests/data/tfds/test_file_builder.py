"""What the TFDS builders share, on a toy data set."""

import contextlib
import functools
import hashlib
import http.server
import json
import subprocess
import sys
import threading

import pytest

from gemma_jax.data import tfds as tfds_lib
from gemma_jax.data.tfds.file_builder import FileBuilder, split_of
from gemma_jax.data.tfds.korean_chatbot import KoreanChatbot

ROWS = [{'instruction': f'Q{i % 199}', 'context': '', 'response': f'A{i}'} for i in range(401)]
CONTENT = '\n'.join(map(json.dumps, ROWS)).encode()


class Toy(FileBuilder):
  """Rows of a file that only this test knows."""

  FIELDS = ('instruction', 'context', 'response')
  FILE = 'toy.jsonl'
  HOMEPAGE = 'https://example.com/toy'
  LICENSE = 'none'

  def parse(self, content):
    yield from map(json.loads, content.splitlines())


class PublishedToy(Toy):
  """The same rows, with an address and a hash."""

  URL = 'http://127.0.0.1:9/toy.jsonl'  # where nobody listens
  SHA256 = hashlib.sha256(CONTENT).hexdigest()


@contextlib.contextmanager
def served(monkeypatch, content):
  """Serves the content, or a 404, as the file of PublishedToy."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      self.send_response(404 if content is None else 200)
      self.end_headers()
      self.wfile.write(content or b'no such file')

    def log_message(self, *args):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}/toy.jsonl'
    monkeypatch.setattr(PublishedToy, 'URL', address)
    yield
    server.shutdown()


def prepare(builder):
  """All splits of a builder, as lists of rows."""
  builder.download_and_prepare()
  return {
    name: [
      {key: value.decode() for key, value in row.items()}
      for row in builder.as_data_source(split=name)
    ]
    for name in ('train', 'validation', 'test')
  }


def toy_file(tmp_path, content=CONTENT):
  path = tmp_path / 'toy.jsonl'
  path.write_bytes(content)
  return str(path)


def test_splits_share_no_prompt_and_keep_the_order(tmp_path):
  splits = prepare(Toy(path=toy_file(tmp_path), data_dir=tmp_path / 'data'))
  assert set(splits) == {'train', 'validation', 'test'}
  for name, rows in splits.items():
    assert rows == [row for row in ROWS if split_of((row['instruction'], row['context'])) == name]
  prompts = {name: {row['instruction'] for row in rows} for name, rows in splits.items()}
  assert sum(map(len, prompts.values())) == len(set().union(*prompts.values()))


def test_about_a_tenth_is_not_for_training():
  splits = [split_of((f'Q{i}', '')) for i in range(4999)]
  assert 200 < splits.count('validation') < 300
  assert 200 < splits.count('test') < 300


def test_splits_are_the_same_on_every_machine():
  names = {'train': '-', 'validation': 'V', 'test': 'T'}
  found = ''.join(names[split_of((f'Q{i}', ''))] for i in range(47))
  assert found == '-------V-V------------------T------------------'


def test_another_content_of_a_free_file_is_prepared_anew(tmp_path):
  data_dir = tmp_path / 'data'
  first = prepare(Toy(path=toy_file(tmp_path), data_dir=data_dir))
  half = b'\n'.join(CONTENT.splitlines()[:300])
  other = prepare(Toy(path=toy_file(tmp_path, half), data_dir=data_dir))
  again = prepare(Toy(path=toy_file(tmp_path), data_dir=data_dir))
  assert sum(map(len, other.values())) == 300
  assert again == first


def test_a_published_file_is_downloaded_and_checked(tmp_path, monkeypatch):
  with served(monkeypatch, CONTENT):
    splits = prepare(PublishedToy(data_dir=tmp_path / 'a'))
  local = PublishedToy(path=toy_file(tmp_path), data_dir=tmp_path / 'b')
  assert prepare(local) == splits
  # Once prepared, neither the file nor the network is needed.
  monkeypatch.undo()
  assert prepare(PublishedToy(data_dir=tmp_path / 'a')) == splits


def test_another_file_is_refused_with_both_hashes(tmp_path, monkeypatch):
  got = hashlib.sha256(b'other').hexdigest()
  message = f'has sha256 {got} .5 bytes., expected {PublishedToy.SHA256}'
  with pytest.raises(ValueError, match=message):
    PublishedToy(path=toy_file(tmp_path, b'other'), data_dir=tmp_path / 'data')
  with served(monkeypatch, b'other'), pytest.raises(ValueError, match=message):
    prepare(PublishedToy(data_dir=tmp_path / 'data'))
  with served(monkeypatch, CONTENT):  # the bad download left nothing behind
    assert prepare(PublishedToy(data_dir=tmp_path / 'data'))['train']


@pytest.mark.parametrize('server', ['absent', 'without the file'])
def test_a_failed_download_tells_how_to_go_on(tmp_path, monkeypatch, server):
  with contextlib.ExitStack() as stack:
    if server != 'absent':
      stack.enter_context(served(monkeypatch, None))
    with pytest.raises(ValueError) as error:
      prepare(PublishedToy(data_dir=tmp_path / 'data'))
  message = str(error.value)
  assert (
    message.startswith(f'tfds:published_toy: cannot download {PublishedToy.URL} (')
    or server != 'absent'
  )
  assert 'tfds:published_toy:/path/toy.jsonl' in message
  assert '\n' not in message


def test_missing_files_are_named(tmp_path):
  with pytest.raises(ValueError, match=r'nope.*which is not a file.*toy\.jsonl'):
    Toy(path=str(tmp_path / 'nope'), data_dir=tmp_path)
  with pytest.raises(ValueError, match='without a file, expected tfds:toy:PATH'):
    Toy(data_dir=tmp_path)
  with pytest.raises(ValueError, match='expected one of tfds:dolly, tfds:kor'):
    tfds_lib.make_builder('toy', data_dir=str(tmp_path))


def test_too_few_rows_prepare_nothing(tmp_path):
  path = toy_file(tmp_path, b'\n'.join(CONTENT.splitlines()[:3]))
  data_dir = tmp_path / 'data'
  with pytest.raises(ValueError, match='got 3 rows, none of which fell into'):
    prepare(Toy(path=path, data_dir=data_dir))
  assert not [file for file in data_dir.rglob('*') if file.is_file()]


def chatbot_file(tmp_path):
  path = tmp_path / 'ChatbotData.csv'
  lines = ''.join(f'질문 {i},답 {i},0\n' for i in range(211))
  path.write_text(f'Q,A,label\n{lines}')
  return str(path)


def test_a_second_process_that_is_faster_does_no_harm(tmp_path, monkeypatch):
  """Its data appears while this one is still preparing its own."""
  path, data_dir = chatbot_file(tmp_path), str(tmp_path / 'data')
  read = functools.partial(tfds_lib.read_split, 'korean_chatbot', 'train', path, data_dir)
  parse = KoreanChatbot.parse
  faster = []

  def parse_after_another(self, content):
    if not faster:
      faster.append(None)
      faster[0] = read()
    return parse(self, content)

  monkeypatch.setattr(KoreanChatbot, 'parse', parse_after_another)
  found = read()
  assert len(found) > 150
  assert faster == [found]


def test_nothing_on_standard_output_and_no_tensorflow(tmp_path):
  """Even where TensorFlow is installed: here, one that cannot be imported."""
  package = tmp_path / 'installed' / 'tensorflow'
  package.mkdir(parents=True)
  (package / '__init__.py').write_text('raise SystemExit("imported")')
  args = ('korean_chatbot', 'train', chatbot_file(tmp_path), str(tmp_path))
  code = f"""
import sys
sys.path.insert(0, {str(package.parent)!r})
from gemma_jax.data import tfds
found = [tfds.read_split(*{args!r}) for _ in range(2)]
assert found[0] == found[1] != []
assert 'tensorflow' not in sys.modules
"""
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout == ''
