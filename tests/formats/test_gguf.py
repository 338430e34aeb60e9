"""GGUF files of every architecture and type, written here and read back."""

import dataclasses
import json
from pathlib import Path
import tracemalloc

import gguf as gguf_package
import numpy as np
import pytest

from gemma_jax import pytree
from gemma_jax.formats import gguf, gguf_file, open_base
from gemma_jax.model import variants
from tests import gguf_toy


def expected_params(config, stored):
  """The unrolled tree, spelt out from the stored arrays."""
  D, N = config.embed_dim, config.num_heads
  K, H = config.num_kv_heads, config.head_dim
  want = {
    'embedder/input_embedding': stored['token_embd.weight'],
    'final_norm/scale': stored['output_norm.weight'] - np.float32(1),
  }
  norms = {
    'attn_norm': 'pre_attention_norm',
    'ffn_norm': 'pre_ffw_norm',
    'post_attention_norm': 'post_attention_norm',
    'post_ffw_norm': 'post_ffw_norm',
    'attn_q_norm': 'attn/q_norm',
    'attn_k_norm': 'attn/k_norm',
  }
  for i in range(config.num_layers):
    get = lambda name, i=i: stored[f'blk.{i}.{name}.weight']
    want |= {
      f'layer_{i}/{name}': x
      for name, x in {
        'attn/q/w': get('attn_q').reshape(N, H, D).swapaxes(1, 2),
        'attn/k/w': get('attn_k').reshape(K, H, D).swapaxes(1, 2),
        'attn/v/w': get('attn_v').reshape(K, H, D).swapaxes(1, 2),
        'attn/o/w': get('attn_output').T.reshape(N, H, D),
        'mlp/gate/w': get('ffn_gate').T,
        'mlp/up/w': get('ffn_up').T,
        'mlp/down/w': get('ffn_down').T,
      }.items()
    }
    for theirs, ours in norms.items():
      if f'blk.{i}.{theirs}.weight' in stored:
        want[f'layer_{i}/{ours}/scale'] = get(theirs) - np.float32(1)
  return want


@pytest.mark.parametrize(
  ('arch', 'config'), [('gemma3', gguf_toy.GEMMA3), ('gemma', gguf_toy.GEMMA1)]
)
@pytest.mark.parametrize('kind', [gguf_toy.F32, gguf_toy.F16, gguf_toy.Q8_0, gguf_toy.Q5_0])
def test_written_weights_are_read(arch, config, kind, tmp_path):
  tensors = gguf_toy.make_tensors(config)
  kinds = {name: kind for name, x in tensors.items() if x.ndim == 2}
  base = gguf_toy.open_gguf(gguf_toy.write(tmp_path / 'm.gguf', arch, config, tensors, kinds))
  assert base.config == config
  assert base.stored_dtype == np.float32
  # Matrices lose what their type loses and no more; norms are exact.
  stored = {
    name: gguf_package.quants.dequantize(gguf_package.quants.quantize(x, kind), kind)
    if x.ndim == 2
    else x
    for name, x in tensors.items()
  }
  tolerance = {
    gguf_toy.F32: 0,
    gguf_toy.F16: 2**-10,
    gguf_toy.Q8_0: 1 / 127,
    gguf_toy.Q5_0: 1 / 15,
  }[kind]
  for name, x in tensors.items():
    np.testing.assert_allclose(stored[name], x, rtol=0, atol=tolerance * np.abs(x).max())
  params = dict(pytree.items(base.load_params(scan_layers=False)))
  want = expected_params(config, stored)
  assert params.keys() == want.keys()
  for name, x in want.items():
    np.testing.assert_array_equal(params[name], x, err_msg=name)


def test_gemma2_takes_its_pattern_and_caps(tmp_path):
  config = dataclasses.replace(
    gguf_toy.GEMMA1,
    num_layers=3,
    layer_is_local=(True, False, True),
    window_size=11,
    use_post_norms=True,
    attention_softcap=5.0,
    final_softcap=3.0,
  )
  u32, f32 = (gguf_package.GGUFValueType[t] for t in ('UINT32', 'FLOAT32'))
  tensors = gguf_toy.make_tensors(config)
  path = gguf_toy.write(
    tmp_path / 'm.gguf',
    'gemma2',
    config,
    tensors,
    a=('gemma2.attn_logit_softcapping', 5.0, f32),
    b=('gemma2.final_logit_softcapping', 3.0, f32),
  )
  assert gguf_toy.open_gguf(path).config == config
  bare = gguf_toy.open_gguf(gguf_toy.write(path, 'gemma2', config, tensors)).config
  assert (bare.attention_softcap, bare.final_softcap) == (50.0, 30.0)
  split = gguf_toy.write(path, 'gemma2', config, tensors, c=('split.count', 3, u32))
  with pytest.raises(ValueError, match='one of 3 parts'):
    gguf_toy.open_gguf(split)


def test_query_scale_of_27b():
  """It is (D / N) ** -0.5, and only the number of layers tells."""
  metadata = {
    'general.architecture': 'gemma3',
    **{
      f'gemma3.{key}': value
      for key, value in {
        'block_count': 62,
        'embedding_length': 5376,
        'feed_forward_length': 21504,
        'attention.head_count': 32,
        'attention.head_count_kv': 16,
        'attention.key_length': 128,
        'attention.layer_norm_rms_epsilon': 1e-6,
        'attention.sliding_window': 1024,
        'context_length': 131072,
        'rope.freq_base': 1e6,
      }.items()
    },
  }
  info = gguf_file.TensorInfo((262_208, 5376), 0, 0)
  infos = {'token_embd.weight': info} | {str(i): info for i in range(808)}
  config = gguf._model_config(metadata, infos, 'file')
  assert config.query_scale == 168**-0.5
  metadata['gemma3.block_count'] = 48
  assert gguf._model_config(metadata, infos, 'file').query_scale is None


def test_tokenizer_is_rebuilt_from_the_metadata(tmp_path):
  pieces = ['<pad>', '<eos>', '<bos>', '<unk>', 'a', 'b', 'ab', '\u2581', '  ']
  kinds = [3, 3, 3, 3, 1, 1, 1, 1, 4] + [6] * 256
  pieces += [f'<0x{byte:02X}>' for byte in range(256)]
  vocabulary = {
    'tokenizer__ggml__tokens': pieces,
    'tokenizer__ggml__scores': [0.0] * 4 + [-5.0, -6.0, -1.0, -2.0, 0.0] + [0.0] * 256,
    'tokenizer__ggml__token_type': kinds,
  }
  string = gguf_package.GGUFValueType.STRING
  tensors = gguf_toy.make_tensors(gguf_toy.GEMMA1)
  tensors['token_embd.weight'] = np.ones((271, 64), np.float32)
  path = tmp_path / 'm.gguf'
  gguf_toy.write(
    path,
    'gemma',
    gguf_toy.GEMMA1,
    tensors,
    model=('tokenizer.ggml.model', 'llama', string),
    chat=('tokenizer.chat_template', 'jinja', string),
    **vocabulary,
  )
  assert gguf_toy.open_gguf(path).read_chat_template() == 'jinja'
  tokenizer = gguf_toy.open_gguf(path).tokenizer()
  assert tokenizer.vocab_size == 265
  assert tokenizer.encode('ab a  b') == [6, 7, 4, 8, 5]
  assert tokenizer.decode([6, 7, 4, 8, 5]) == 'ab a  b'

  gguf_toy.write(path, 'gemma', gguf_toy.GEMMA1, tensors)
  assert gguf_toy.open_gguf(path).tokenizer() is None
  assert gguf_toy.open_gguf(path).read_chat_template() is None
  gguf_toy.write(
    path,
    'gemma',
    gguf_toy.GEMMA1,
    tensors,
    model=('tokenizer.ggml.model', 'gpt2', string),
    **vocabulary,
  )
  with pytest.raises(ValueError, match="'gpt2', expected 'llama'"):
    gguf_toy.open_gguf(path).tokenizer()


Q1 = 'blk.1.attn_q.weight'


@pytest.mark.parametrize(
  ('change', 'kinds', 'message'),
  [
    (lambda t: t.pop(Q1), {}, f'{Q1} is missing'),
    (lambda t: t.pop('token_embd.weight'), {}, r'token_embd\.weight is missing'),
    (
      lambda t: t.update({'output.weight': t['token_embd.weight']}),
      {},
      r'output\.weight is unexpected',
    ),
    (lambda t: t.update({Q1: t[Q1][:61]}), {}, rf'{Q1} has shape \[61, 64\], expected \[96, 64\]'),
    (
      lambda t: t.update({'token_embd.weight': t[Q1].T}),
      {},
      r'token_embd\.weight has shape \[64, 96\], expected \[64, 64\]',
    ),
    (lambda t: None, {Q1: gguf_toy.I8}, f'{Q1} has type I8'),
  ],
)
def test_tensors_are_exactly_those_expected(change, kinds, message, tmp_path):
  tensors = gguf_toy.make_tensors(gguf_toy.GEMMA1)
  change(tensors)
  path = gguf_toy.write(tmp_path / 'bad.gguf', 'gemma', gguf_toy.GEMMA1, tensors, kinds)
  with pytest.raises(ValueError, match=message) as e:
    gguf_toy.open_gguf(path)
  assert str(path) in str(e.value)
  assert '\n' not in str(e.value)


def test_other_architectures_are_refused(tmp_path):
  path = tmp_path / 'm.gguf'
  gguf_toy.write(path, 'llama', gguf_toy.GEMMA1, {'token_embd.weight': np.ones((3, 5), 'f')})
  with pytest.raises(ValueError, match="'llama', expected gemma"):
    gguf_toy.open_gguf(path)


def test_metadata_that_is_missing_is_named(tmp_path):
  path = tmp_path / 'm.gguf'
  writer = gguf_package.GGUFWriter(path, 'gemma3')
  writer.add_block_count(1)
  writer.add_tensor('token_embd.weight', np.ones((3, 5), 'f'))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(ValueError, match=r'gemma3\.attention\.key_length is None'):
    gguf_toy.open_gguf(path)


@pytest.fixture(scope='module')
def real():
  return open_base.open_base('gemma3_270m')


@pytest.mark.real
def test_real_270m_has_its_parameters(real):
  assert real.config == variants.GEMMA3_270M
  tracemalloc.start()
  params = real.load_params()
  _, peak_bytes = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert pytree.num_params(params) == 268_098_176
  # The result, and no second copy of any leaf.
  assert peak_bytes < 1.1 * pytree.num_bytes(params)
  for name, x in pytree.items(params):
    assert np.isfinite(x).all(), name
    assert np.std(x) > 0.01, name


@pytest.mark.real
def test_real_tokenizer_is_the_oracles(real):
  tokenizer = real.tokenizer()
  assert tokenizer.vocab_size == real.config.vocab_size
  golden = Path(__file__).parents[1] / 'golden' / 'oracle_gemma3_270m.json'
  rows = json.loads(golden.read_text())['tokenizer']
  assert len(rows) == 57
  for row in rows:
    assert tokenizer.encode(row['text']) == row['spm'], row['text']
    assert tokenizer.decode(row['spm']) == row['spm_decode']


@pytest.mark.real
def test_no_text_becomes_a_control_token_of_the_real_tokenizer(real):
  """Over the whole vocabulary; other user-defined pieces are still found."""
  tokenizer = real.tokenizer()
  arrays = ('tokenizer.ggml.tokens', 'tokenizer.ggml.token_type')
  metadata, _ = gguf_file.read_header(real.files[0], arrays)
  pieces, types = (metadata[name] for name in arrays)
  special = {'[multimodal]', '<start_of_image>', '<end_of_image>'}
  special |= {p for p, kind in zip(pieces, types, strict=True) if kind == 3}
  assert len(special) == 6252
  user_defined = [
    p for p, kind in zip(pieces, types, strict=True) if kind == 4 and p not in special
  ]
  ids = {piece: i for i, piece in enumerate(pieces)}
  control = {ids[piece] for piece in special}
  for piece, got in zip(special, tokenizer.encode_all([*special]), strict=True):
    assert control.isdisjoint(got), piece
    assert tokenizer.decode(got) == piece
  for piece in special - {'<unk>'}:
    assert tokenizer.control_id(piece) == ids[piece]
  for piece in user_defined:
    assert tokenizer.encode(piece) == [ids[piece]], piece
  # No other piece's text makes one either.
  for got in tokenizer.encode_all(pieces):
    assert control.isdisjoint(got)
