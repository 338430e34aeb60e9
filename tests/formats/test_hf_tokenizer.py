"""Added tokens of a Hugging Face folder: named in three ways, or refused."""

import json
import logging
import shutil

import numpy as np
import pytest

from gemma_jax.data import examples as examples_lib
from gemma_jax.formats import hf_tokenizer, open_base
from gemma_jax.model.transformer import Transformer
from gemma_jax.training import losses
from tests import data_toy, hf_toy

N = data_toy.make_tokenizer().vocab_size
TOOL = {'id': N, 'content': '<tool>', 'special': False, 'lstrip': False}
THINK = {'id': N + 1, 'content': '</think>', 'special': True, 'lstrip': True}


def write(folder, **contents):
  """tokenizer.model, and JSON files by their names with `_` for the dot."""
  folder.mkdir(exist_ok=True)
  proto = data_toy.make_tokenizer().model_proto
  (folder / 'tokenizer.model').write_bytes(proto)
  for name, content in contents.items():
    (folder / f'{name}.json').write_text(json.dumps(content))
  return folder


def decoder(*tokens):
  return {
    'added_tokens_decoder': {
      str(t['id']): {k: v for k, v in t.items() if k != 'id'} for t in tokens
    }
  }


@pytest.mark.parametrize(
  ('contents', 'ids'),
  [
    ({}, ()),
    ({'config': {'eos_token_id': 1}}, (1,)),
    ({'generation_config': {'eos_token_id': [1, 106]}, 'config': {'eos_token_id': 1}}, (1, 106)),
    ({'generation_config': {'eos_token_id': None}, 'config': {'eos_token_id': [1, 5]}}, (1, 5)),
  ],
)
def test_stop_ids(contents, ids, tmp_path):
  assert hf_tokenizer.stop_ids(write(tmp_path, **contents)) == ids


@pytest.mark.parametrize('value', ['1', True, [1, 2.0], {'id': 1}])
def test_stop_ids_that_are_not_ids_are_refused(value, tmp_path):
  folder = write(tmp_path, generation_config={'eos_token_id': value})
  with pytest.raises(
    ValueError, match=r'generation_config\.json: got eos_token_id=.*a list of ids'
  ):
    hf_tokenizer.stop_ids(folder)


@pytest.mark.parametrize(
  'contents',
  [
    {'tokenizer': {'added_tokens': [TOOL, THINK]}},
    {'tokenizer_config': decoder(TOOL, THINK)},
    {
      'added_tokens': {'<tool>': N, '</think>': N + 1},
      'special_tokens_map': {'additional_special_tokens': ['</think>']},
    },
    {
      'added_tokens': {'<tool>': N, '</think>': N + 1},
      'tokenizer': {'added_tokens': [TOOL]},
      'tokenizer_config': {**decoder(TOOL), 'eos_token': {'content': '</think>'}},
    },
  ],
  ids=['tokenizer', 'config', 'added', 'all'],
)
def test_each_way_to_name_them(contents, tmp_path):
  tokenizer = hf_tokenizer.read(write(tmp_path, **contents), N + 9)
  assert tokenizer.vocab_size == N + 2
  assert tokenizer.encode('<tool>') == [N]
  assert tokenizer.decode([N, N + 1]) == '<tool>'
  assert tokenizer.control_id('</think>') == N + 1
  assert N + 1 not in tokenizer.encode('</think>')


def test_a_special_token_without_a_row_is_left_out(tmp_path):
  image = {'id': N, 'content': '<image_soft_token>', 'special': True}
  write(tmp_path, tokenizer={'added_tokens': [image]})
  assert hf_tokenizer.read(tmp_path, N).vocab_size == N
  assert hf_tokenizer.read(tmp_path, N + 1).vocab_size == N + 1
  write(tmp_path, tokenizer={}, added_tokens={'<image_soft_token>': N})
  assert hf_tokenizer.read(tmp_path, N).vocab_size == N
  (tmp_path / 'tokenizer.model').unlink()
  assert hf_tokenizer.read(tmp_path, N) is None


@pytest.mark.parametrize(
  ('contents', 'message'),
  [
    (
      {'tokenizer': {'added_tokens': [TOOL]}, 'added_tokens': {'<other>': N}},
      rf"added_tokens.json: token {N} is '<other>', but .*tokenizer.json says",
    ),
    (
      {'added_tokens': {'<tool>': N + 9}},
      rf"'<tool>' has id {N + 9}, expected one below {N + 9}, the rows",
    ),
    ({'added_tokens': ['<tool>']}, 'got a list, expected a JSON object'),
    ({'added_tokens': {'<tool>': -1}}, 'expected an id and a content'),
    ({'added_tokens': {'': N}}, 'expected an id and a content'),
    ({'added_tokens': {'a\ud800': N}}, 'expected an id and a content'),
    ({'tokenizer': {'added_tokens': {}}}, 'added_tokens is something else, expected a list'),
    ({'tokenizer': {'added_tokens': [7]}}, 'got added token 7, expected an id'),
    (
      {'tokenizer_config': {'added_tokens_decoder': {'x': {'content': 'y'}}}},
      'expected an id and a content',
    ),
    (
      {'tokenizer': {'added_tokens': [{**TOOL, 'lstrip': True}]}},
      "added token '<tool>' has lstrip",
    ),
    ({'added_tokens': {'Hi': N}}, "added token 'Hi' has id"),
  ],
)
def test_contradictions_are_one_line(contents, message, tmp_path):
  with pytest.raises(ValueError, match=message) as error:
    hf_tokenizer.read(write(tmp_path, **contents), N + 9)
  assert '\n' not in str(error.value)


def test_a_chat_template_wherever_it_is(tmp_path):
  read = hf_tokenizer.chat_template
  assert read(tmp_path) is None
  several = [{'name': 'tools', 'template': 'x'}, 7]
  write(tmp_path, tokenizer_config={'chat_template': several})
  assert read(tmp_path) is None
  write(tmp_path, chat_template={'chat_template': 'json'})
  assert read(tmp_path) == 'json'
  several.append({'name': 'default', 'template': 'config'})
  write(tmp_path, tokenizer_config={'chat_template': several})
  assert read(tmp_path) == 'config'
  (tmp_path / 'chat_template.jinja').write_text('jinja')
  assert read(tmp_path) == 'jinja'
  (tmp_path / 'chat_template.jinja').write_bytes(b'\xff')
  with pytest.raises(ValueError, match=r'chat_template\.jinja: expected UTF-8'):
    read(tmp_path)


def resized(folder):
  """The golden Gemma 3 with a tokenizer, and two of its rows added to it."""
  golden = hf_toy.PARITY / 'gemma3'
  for name in ('config.json', 'model.safetensors'):
    shutil.copyfile(golden / name, folder / name)
  return write(folder, added_tokens={'<tool>': N, '</tool>': N + 1})


def token_losses(base, record):
  """Nats of each supervised token of a record, as training computes them."""
  tokenizer = base.tokenizer()
  examples = examples_lib.make_examples(
    data_toy.records([record], 'plain'),
    tokenizer,
    vocab_size=tokenizer.vocab_size,
    template='plain',
  )
  tokens = examples.tokens[None]
  params = base.load_params('float32')
  hidden = Transformer(base.config).apply({'params': params}, tokens)
  return tokens, np.asarray(
    losses.token_cross_entropy(
      hidden[:, :-1],
      params['embedder']['input_embedding'],
      tokens[:, 1:],
      np.ones((1, tokens.shape[1] - 1), np.float32),
      num_pieces=tokenizer.vocab_size,
    )
  )


def test_rows_of_a_resized_embedding_are_tokens(tmp_path):
  base = open_base.open_base(str(resized(tmp_path)))
  assert base.config.vocab_size == 512
  assert base.tokenizer().vocab_size == N + 2
  ids, nll = token_losses(base, {'tokens': [2, 10, N, 11, N + 1, 1]})
  assert ids.max() == N + 1
  assert 0 < nll.max() < 30
  text, _ = token_losses(base, {'prompt': 'H<tool>', 'response': '</tool>'})
  assert text[0, -3:].tolist() == [N, N + 1, 1]
  with pytest.raises(ValueError, match=f'got token id {N + 2}, .* below {N + 2}'):
    token_losses(base, {'tokens': [2, N + 2, 1]})


@pytest.mark.parity
def test_the_loss_of_added_tokens_is_transformers(tmp_path):
  """Transformers masks no row: so all of them are named here."""
  transformers = pytest.importorskip('transformers')
  torch = pytest.importorskip('torch')
  base = open_base.open_base(str(resized(tmp_path)))
  rest = {f'<t{i}>': i for i in range(N + 2, 512)}
  (tmp_path / 'tokenizer_config.json').write_text(
    json.dumps(decoder(*({'id': i, 'content': name} for name, i in rest.items())))
  )
  record = {'tokens': [2, 10, N, 11, N + 1, 1]}
  tokens, nll = token_losses(base, record)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
  ids = torch.tensor(np.asarray(tokens, np.int64))
  with torch.no_grad():
    want = float(model(ids, labels=ids).loss)
  np.testing.assert_allclose(nll.mean(), want, rtol=1e-5)


def test_another_tokenizer_that_lacks_added_tokens_is_a_warning(tmp_path, caplog):
  (tmp_path / 'base').mkdir()
  folder = resized(tmp_path / 'base')
  own = str(folder / 'tokenizer.model')
  with caplog.at_level(logging.WARNING):
    open_base.open_base(str(folder))
    assert not caplog.records
    open_base.open_base(str(folder), own)
  (message,) = caplog.messages
  assert f'names 2 tokens that the tokenizer {own} lacks: <tool>, </tool>' in message
  # One that holds them has nothing to say.
  path = tmp_path / 'whole.model'
  path.write_bytes(open_base.open_base(str(folder)).tokenizer().model_proto)
  caplog.clear()
  with caplog.at_level(logging.WARNING):
    open_base.open_base(str(folder), str(path))
  assert not caplog.records
