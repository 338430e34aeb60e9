"""The real client of the Hub against a small server on this machine."""

import hashlib
import http.server
import json
import os
from pathlib import Path
import subprocess
import sys
import threading

import pytest

from gemma_jax.formats import hub, open_base
from tests import hf_toy

huggingface_hub = pytest.importorskip('huggingface_hub')

SHA = '0123456789abcdef0123456789abcdef01234567'
NAME = 'google/gemma-toy'


class _Handler(http.server.BaseHTTPRequestHandler):
  """What snapshot_download asks of the Hub: a model's files, then each."""

  protocol_version = 'HTTP/1.1'

  def do_HEAD(self):
    self._answer(with_body=False)

  def do_GET(self):
    self._answer(with_body=True)

  def _answer(self, with_body):
    server = self.server
    path = self.path.split('?')[0]
    server.requests.append((self.command, path, self.headers.get('Range')))
    api = f'/api/models/{NAME}'
    if server.gated and NAME in path:
      return self._error(403, 'GatedRepo')
    if path in (api, f'{api}/revision/main', f'{api}/revision/{SHA}'):
      body = {
        'id': NAME,
        'sha': SHA,
        'siblings': [{'rfilename': n, 'size': len(x)} for n, x in server.files.items()],
      }
      return self._send(json.dumps(body).encode(), with_body)
    if path.startswith(f'{api}/revision/'):
      return self._error(404, 'RevisionNotFound')
    if path.startswith(f'{api}/tree/'):
      body = [
        {'type': 'file', 'path': n, 'size': len(x), 'oid': _etag(x)}
        for n, x in server.files.items()
      ]
      return self._send(json.dumps(body).encode(), with_body)
    stem = f'/{NAME}/resolve/{SHA}/'
    if path.startswith(stem) and path[len(stem) :] in server.files:
      return self._send(server.files[path[len(stem) :]], with_body)
    return self._error(404, 'RepoNotFound')

  def _send(self, content, with_body):
    first = 0
    asked = self.headers.get('Range')
    if asked:
      first = int(asked.removeprefix('bytes=').split('-')[0])
    part = content[first:]
    self.send_response(206 if asked else 200)
    if asked:
      last = len(content) - 1
      self.send_header('Content-Range', f'bytes {first}-{last}/{len(content)}')
    self.send_header('ETag', f'"{_etag(content)}"')
    self.send_header('X-Repo-Commit', SHA)
    self.send_header('Accept-Ranges', 'bytes')
    self.send_header('Content-Length', str(len(part)))
    self.end_headers()
    if not with_body:
      return
    if self.server.cut and len(part) > self.server.cut:
      self.wfile.write(part[: self.server.cut])  # and the connection is lost
      self.server.cut = 0
      self.wfile.flush()
      self.connection.close()
      return
    self.wfile.write(part)

  def _error(self, status, code):
    self.send_response(status)
    self.send_header('X-Error-Code', code)
    self.send_header('X-Error-Message', code)
    self.send_header('Content-Length', '0')
    self.end_headers()

  def log_message(self, *args):
    pass


def _etag(content):
  return hashlib.sha1(content).hexdigest()


@pytest.fixture
def server():
  folder = hf_toy.PARITY / 'gemma3'
  httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
  httpd.files = {
    name: (folder / name).read_bytes() for name in ('config.json', 'model.safetensors')
  }
  httpd.files['pytorch_model.bin'] = b'pickled'
  httpd.files['gemma.gguf'] = b'large'
  httpd.requests, httpd.gated, httpd.cut = [], False, 0
  thread = threading.Thread(target=httpd.serve_forever, daemon=True)
  thread.start()
  yield httpd
  httpd.shutdown()
  httpd.server_close()


# In a process of its own: the client reads its settings when imported.
_PROGRAM = """
import sys
from gemma_jax.formats import hub
try:
  print(hub.fetch(sys.argv[1]))
except ValueError as e:
  print('refused:', e)
"""


def fetch(reference, endpoint, home):
  env = {
    name: x
    for name, x in os.environ.items()
    if 'proxy' not in name.lower() and not name.startswith('HF_')
  }
  env |= {
    'HF_ENDPOINT': endpoint,
    'HF_HOME': str(home),
    'HF_HUB_DISABLE_XET': '1',
    'HF_HUB_ETAG_TIMEOUT': '2',
    'JAX_PLATFORMS': 'cpu',
    'NO_PROXY': '127.0.0.1',
  }
  done = subprocess.run(
    [sys.executable, '-c', _PROGRAM, reference],
    capture_output=True,
    text=True,
    env=env,
    cwd=Path(__file__).parents[2],
    check=True,
  )
  (line,) = done.stdout.splitlines()
  return line


def endpoint(server):
  return f'http://127.0.0.1:{server.server_address[1]}'


def test_needed_files_are_fetched_once(server, tmp_path):
  of_instruct_models = ('chat_template.jinja', 'added_tokens.json')
  server.files |= dict.fromkeys(of_instruct_models, b'{}')
  folder = Path(fetch(f'hf:{NAME}', endpoint(server), tmp_path))
  assert {p.name for p in folder.iterdir()} == {
    'config.json',
    'model.safetensors',
    *of_instruct_models,
  }
  hf_toy.assert_trees_equal(
    open_base.open_base(str(folder)).load_params(),
    open_base.open_base(str(hf_toy.PARITY / 'gemma3')).load_params(),
  )
  before = len(server.requests)
  assert fetch(f'hf:{NAME}@{SHA}', endpoint(server), tmp_path) == str(folder)
  assert not any(
    method == 'GET' and '/resolve/' in path for method, path, _ in server.requests[before:]
  )
  # And without a network, from the cache.
  server.shutdown()
  server.server_close()
  assert fetch(f'hf:{NAME}', endpoint(server), tmp_path) == str(folder)


def test_download_that_was_cut_goes_on(server, tmp_path):
  content = bytes(range(250)) * 100_000
  server.files['model.safetensors'] = content
  server.cut = 21_000_000
  folder = fetch(f'hf:{NAME}', endpoint(server), tmp_path)
  if folder.startswith('refused'):  # the client itself may go on at once
    assert 'resumes the download' in folder
    folder = fetch(f'hf:{NAME}', endpoint(server), tmp_path)
  assert (Path(folder) / 'model.safetensors').read_bytes() == content
  starts = [
    int(asked.removeprefix('bytes=').rstrip('-'))
    for _, _, asked in server.requests
    if asked and asked.endswith('-')
  ]
  # Whole blocks of the client are kept, of 10 MiB each.
  assert max(starts) >= 10_000_000


def test_what_cannot_be_fetched_is_one_clear_line(server, tmp_path):
  url = endpoint(server)
  assert "has no revision 'v9'" in fetch(f'hf:{NAME}@v9', url, tmp_path)
  assert 'the Hub does not have' in fetch('hf:google/none', url, tmp_path)
  server.gated = True
  line = fetch(f'hf:{NAME}', url, tmp_path)
  assert f'accept it at https://huggingface.co/{NAME} and log in' in line
  server.shutdown()
  server.server_close()
  line = fetch(f'hf:{NAME}', url, tmp_path)
  assert 'not in the cache, and the Hub cannot be reached' in line


@pytest.mark.parametrize(
  'reference', ['hf:', 'hf:gemma', 'hf:a/b/c', 'hf:a/b@', 'hf:../../x', 'hf:a/b c']
)
def test_references_that_are_none(reference):
  with pytest.raises(ValueError, match='expected hf:OWNER/NAME'):
    hub.fetch(reference)


def test_error_of_any_library_is_one_line(monkeypatch):
  """httpx's and Xet's are no OSError, and some have no message."""

  class ReadTimeout(Exception):
    pass

  for message, reason in (
    ('', 'ReadTimeout'),
    ('slow\nx', 'slow'),
    ('\n slow', 'slow'),
    (' \n', 'ReadTimeout'),
  ):

    def fail(*args, message=message, **kwargs):
      raise ReadTimeout(message)

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', fail)
    with pytest.raises(ValueError, match=rf'fetched completely \({reason}\)'):
      hub.fetch('hf:a/b')
