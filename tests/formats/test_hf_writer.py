"""A folder for transformers: bit-equal weights, shards, config, tokenizer."""

import dataclasses
import functools
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma_jax.data import tokenizer as tokenizer_lib
from gemma_jax.formats import chat_template, flax_writer, hf_config, hf_writer, open_base
from gemma_jax.formats.base_source import CHUNK_ELEMENTS, StoredTensor
from gemma_jax.model import variants
from tests import data_toy, hf_toy, logits_toy, toy


@pytest.mark.parametrize('family', hf_toy.FAMILIES)
@pytest.mark.parametrize('max_shard_bytes', [10**9, 100_003])
def test_round_trip_is_bit_equal(family, max_shard_bytes, tmp_path):
  base = open_base.open_base(str(hf_toy.PARITY / family))
  hf_writer.write_folder(tmp_path, base, 'auto', max_shard_bytes)
  again = open_base.open_base(str(tmp_path))
  assert again.config == base.config
  assert (len(again.files) > 3) == (max_shard_bytes < 10**6)
  hf_toy.assert_trees_equal(again.load_params(), base.load_params())
  # The golden file is transformers' own.
  got = {n: x for f in again.files for n, x in load_file(f).items()}
  hf_toy.assert_trees_equal(got, hf_toy.tensors_of(family))


def test_bfloat16_is_rounded_once(tmp_path):
  base = open_base.open_base(str(hf_toy.PARITY / 'gemma2'))
  hf_writer.write_folder(tmp_path, base, 'bfloat16')
  again = open_base.open_base(str(tmp_path))
  assert again.stored_dtype == ml_dtypes.bfloat16
  hf_toy.assert_trees_equal(again.load_params(), base.load_params('bfloat16'))
  raw = json.loads((tmp_path / 'config.json').read_text())
  assert raw['dtype'] == raw['torch_dtype'] == 'bfloat16'
  with pytest.raises(ValueError, match='dtype: got float16, expected auto'):
    hf_writer.write_folder(tmp_path, base, 'float16')


def test_shards_hold_at_most_their_bytes_and_the_index_all(tmp_path):
  base = open_base.open_base('random:tiny3')
  hf_writer.write_folder(tmp_path, base, 'float32', 50_000)
  shards = sorted(tmp_path.glob('model-*.safetensors'))
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  total = 0
  for path in shards:
    tensors = load_file(path)
    total += sum(x.nbytes for x in tensors.values())
    assert path.stat().st_size < 50_000 + 5_000
    assert {n for n, f in index['weight_map'].items() if f == path.name} == (tensors.keys())
  assert index['metadata']['total_size'] == total
  assert shards[-1].name == f'model-{len(shards):05}-of-{len(shards):05}' + ('.safetensors')


def test_rows_that_pad_the_flax_release_are_left_out(tmp_path):
  config = dataclasses.replace(variants.TINY, vocab_size=256_128, embed_dim=6, num_layers=1)
  toy = logits_toy.source_of(config)
  hf_writer.write_folder(tmp_path, toy, 'bfloat16')
  again = open_base.open_base(str(tmp_path))
  assert again.config == dataclasses.replace(config, vocab_size=256_000)
  np.testing.assert_array_equal(
    again.load_params()['embedder']['input_embedding'],
    toy.load_params('bfloat16')['embedder']['input_embedding'][:256_000],
  )


def test_files_of_the_tokenizer(tmp_path):
  proto = logits_toy.tokenizer_proto()
  origin = tmp_path / 'origin'
  base = logits_toy.source_of(dataclasses.replace(variants.TINY, vocab_size=307))
  origin.mkdir()
  with_tokenizer = dataclasses.replace(
    base, make_tokenizer=functools.partial(logits_toy.make_tokenizer, proto)
  )
  hf_writer.write_folder(origin, with_tokenizer)
  assert (origin / 'tokenizer.model').read_bytes() == proto
  generation = json.loads((origin / 'generation_config.json').read_text())
  assert generation['eos_token_id'] == [1, 5]  # <end_of_turn> is piece 5
  assert open_base.open_base(str(origin)).tokenizer().model_proto == proto

  # What stands beside the base's own tokenizer goes along with it ...
  (origin / 'tokenizer_config.json').write_text('{"mine": 1}')
  generation = '{"eos_token_id": [1, 5, 7], "top_k": 64}'
  (origin / 'generation_config.json').write_text(generation)
  copy = tmp_path / 'copy'
  copy.mkdir()
  hf_writer.write_folder(copy, open_base.open_base(str(origin)))
  config = json.loads((copy / 'tokenizer_config.json').read_text())
  assert config.pop('added_tokens_decoder').keys() == set('012345')
  assert config == {'mine': 1}
  assert (copy / 'generation_config.json').read_text() == generation
  # ... and not with another that replaces it.
  (tmp_path / 'other.model').write_bytes(logits_toy.tokenizer_proto(7))
  other = tmp_path / 'other'
  other.mkdir()
  hf_writer.write_folder(other, open_base.open_base(str(origin), str(tmp_path / 'other.model')))
  assert 'mine' not in (other / 'tokenizer_config.json').read_text()
  assert 'top_k' not in (other / 'generation_config.json').read_text()
  assert (other / 'tokenizer.model').read_bytes() != proto
  # Without SentencePiece there is none.
  plain = tmp_path / 'plain'
  plain.mkdir()
  hf_writer.write_folder(plain, base)
  assert not list(plain.glob('tokenizer*'))
  generation = json.loads((plain / 'generation_config.json').read_text())
  assert generation['eos_token_id'] == 1


def with_tokenizer(base):
  proto = logits_toy.tokenizer_proto()
  return dataclasses.replace(
    base, make_tokenizer=functools.partial(logits_toy.make_tokenizer, proto)
  )


def export(folder, base, **kwargs):
  """(folder, tokenizer_config.json, stop ids) of what is written."""
  folder.mkdir()
  hf_writer.write_folder(folder, base, **kwargs)
  config = json.loads((folder / 'tokenizer_config.json').read_text())
  generation = json.loads((folder / 'generation_config.json').read_text())
  return config, generation['eos_token_id']


def test_pieces_that_are_not_merged_are_named(tmp_path):
  """Without them llama.cpp takes user-defined pieces for plain ones."""
  proto = data_toy.make_tokenizer().model_proto
  base = dataclasses.replace(
    logits_toy.source_of(dataclasses.replace(variants.TINY, vocab_size=307)),
    make_tokenizer=functools.partial(logits_toy.make_tokenizer, proto),
  )
  config, _ = export(tmp_path / 'a', base)
  pieces, _, types = data_toy.vocabulary()
  entries = config['added_tokens_decoder']
  assert entries.keys() == {str(i) for i, kind in enumerate(types) if kind in (3, 4)}
  for i, entry in entries.items():
    assert entry == {
      'content': pieces[int(i)].replace(' ', '▁'),
      'lstrip': False,
      'normalized': False,
      'rstrip': False,
      'single_word': False,
      'special': types[int(i)] == 3,
    }
  again = open_base.open_base(str(tmp_path / 'a')).tokenizer()
  assert again.fingerprint() == base.tokenizer().fingerprint()


def test_what_a_base_names_in_part_is_completed(tmp_path):
  base = with_tokenizer(logits_toy.source_of(dataclasses.replace(variants.TINY, vocab_size=307)))
  whole = export(tmp_path / 'base', base)[0]['added_tokens_decoder']
  path = tmp_path / 'base' / 'tokenizer_config.json'
  own = {'content': '<end_of_turn>', 'special': True, 'lstrip': True}
  path.write_text(json.dumps({'added_tokens_decoder': {'5': own}}))
  config, _ = export(tmp_path / 'copy', open_base.open_base(str(tmp_path / 'base')))
  assert config['added_tokens_decoder'] == {**whole, '5': own}


def test_templates_and_stops_of_base_and_adapter(tmp_path):
  config = dataclasses.replace(variants.TINY, vocab_size=307)
  base = with_tokenizer(logits_toy.source_of(config))
  template = lambda name: (tmp_path / name / 'chat_template.jinja').read_text()
  # A base without a template of its own: Gemma's turns, or the adapter's.
  assert export(tmp_path / 'base', base)[1] == [1, 5]
  assert template('base') == chat_template.jinja('chat')
  assert export(tmp_path / 'dolly', base, trained_on='dolly')[1] == [1, 5]
  assert template('dolly') == chat_template.jinja('dolly')

  # One with its own template in tokenizer_config.json, and its own stops.
  (tmp_path / 'base' / 'chat_template.jinja').unlink()
  path = tmp_path / 'base' / 'tokenizer_config.json'
  own = {**json.loads(path.read_text()), 'chat_template': '<start_of_turn>'}
  path.write_text(json.dumps(own))
  path = tmp_path / 'base' / 'generation_config.json'
  path.write_text('{"eos_token_id": 5, "top_k": 64}')
  base = open_base.open_base(str(tmp_path / 'base'))
  for name, trained_on, stops in (('copy', None, 5), ('chat', 'chat', [5, 1])):
    told, got = export(tmp_path / name, base, trained_on=trained_on)
    assert told == own
    assert got == stops
    assert not (tmp_path / name / 'chat_template.jinja').exists()
  told, got = export(tmp_path / 'korean', base, trained_on='korean')
  assert told == {k: v for k, v in own.items() if k != 'chat_template'}
  assert template('korean') == chat_template.jinja('korean')
  assert got == [5, 1]
  generation = (tmp_path / 'korean' / 'generation_config.json').read_text()
  assert json.loads(generation)['top_k'] == 64


def test_added_tokens_go_along(tmp_path):
  config = dataclasses.replace(variants.TINY, vocab_size=307)
  base = with_tokenizer(logits_toy.source_of(config))
  n = base.tokenizer().vocab_size
  export(tmp_path / 'base', base)
  (tmp_path / 'base' / 'added_tokens.json').write_text(f'{{"<tool>": {n}}}')
  base = open_base.open_base(str(tmp_path / 'base'))
  assert base.tokenizer().encode('a<tool>')[1:] == [n]
  export(tmp_path / 'copy', base)
  copied = (tmp_path / 'copy' / 'tokenizer.model').read_bytes()
  assert copied == logits_toy.tokenizer_proto()
  again = open_base.open_base(str(tmp_path / 'copy')).tokenizer()
  assert again.fingerprint() == base.tokenizer().fingerprint()
  # A Flax release has no other file: its tokenizer.model holds them.
  (tmp_path / 'flax').mkdir()
  flax_writer.write_folder(tmp_path / 'flax', base)
  again = tokenizer_lib.SentencePieceTokenizer.from_file(str(tmp_path / 'flax' / 'tokenizer.model'))
  assert again.encode('<tool>') == [n]


@pytest.mark.parametrize('name', sorted(variants.VARIANTS))
def test_config_says_every_variant(name):
  config = variants.get(name)
  raw = hf_config.to_json(config, np.dtype(np.float32))
  assert hf_config.model_config(raw, 99, 'config.json') == config
  # Either dialect alone says it too.
  new = ('rope_parameters', 'layer_types')
  old = ('rope_theta', 'rope_scaling', 'rope_local_base_freq', 'sliding_window_pattern')
  for keys in (new, old):
    part = {k: v for k, v in raw.items() if k not in keys}
    assert hf_config.model_config(part, 99, 'config.json') == config


@pytest.mark.parametrize(
  ('change', 'field'),
  [
    ({'attention_softcap': 5.0}, 'attention_softcap'),
    ({'query_scale': 0.3}, 'query_scale'),
    ({'layer_is_local': (True, False), 'window_size': 3}, 'layer_is_local'),
    ({'use_qk_norm': True}, 'use_post_norms'),
  ],
)
def test_architecture_without_a_class_of_transformers(change, field, tmp_path):
  base = logits_toy.source_of(dataclasses.replace(variants.TINY, **change))
  with pytest.raises(ValueError, match=f'{field}: got .* no Hugging Face form'):
    hf_writer.write_folder(tmp_path, base)


def test_tensors_are_written_in_ranges_of_rows(tmp_path):
  """No read asks for more than a chunk, so memory stays small."""
  largest = 0
  base = logits_toy.source_of(
    dataclasses.replace(variants.TINY, vocab_size=10_007, embed_dim=1_024)
  )

  def watched(tensor):
    def read(start, stop):
      nonlocal largest
      rows = tensor.read(start, stop)
      largest = max(largest, rows.size)
      return rows

    return StoredTensor(tensor.name, tensor.shape, read)

  tensors = {path: watched(t) for path, t in base.tensors.items()}
  hf_writer.write_folder(tmp_path, dataclasses.replace(base, tensors=tensors), 'bfloat16')
  assert largest == CHUNK_ELEMENTS < 10_007 * 1_024


@pytest.mark.parity
@pytest.mark.parametrize('family', hf_toy.FAMILIES)
@pytest.mark.parametrize('dialect', ['both', 'old'])
def test_transformers_computes_the_same_logits(family, dialect, tmp_path):
  transformers = pytest.importorskip('transformers')
  torch = pytest.importorskip('torch')
  base = open_base.open_base(str(hf_toy.PARITY / family))
  hf_writer.write_folder(tmp_path, base, 'float32', 100_003)
  if dialect == 'old':
    path = tmp_path / 'config.json'
    raw = json.loads(path.read_text())
    for key in ('rope_parameters', 'layer_types', 'dtype'):
      raw.pop(key, None)
    path.write_text(json.dumps(raw))
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
  assert (
    type(model).__name__
    == {'gemma1': 'GemmaForCausalLM', 'gemma2': 'Gemma2ForCausalLM', 'gemma3': 'Gemma3ForCausalLM'}[
      family
    ]
  )
  tokens = np.random.default_rng(0).integers(4, 512, (2, 13))
  with torch.no_grad():
    got = model(torch.tensor(tokens)).logits.numpy()
  want = logits_toy.logits(base.config, base.load_params(), tokens)
  toy.assert_close(got, want, 1e-4)
