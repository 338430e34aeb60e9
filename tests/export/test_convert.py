import dataclasses
import json
import logging
import os
from pathlib import Path
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gemma_jax import pytree
from gemma_jax.config.train import LoraConfig
from gemma_jax.export import convert, merged
from gemma_jax.formats import adapter as adapter_lib
from gemma_jax.formats import chat_template, hf_writer, open_base, peft
from gemma_jax.formats.base_source import StoredTensor
from gemma_jax.formats.trained_with import TrainedWith
from gemma_jax.lora import factors as factors_lib
from gemma_jax.lora.lora import Lora
from gemma_jax.model import variants
from tests import gcs_toy, hf_toy, logits_toy, peft_toy, toy

TOKENS = np.random.default_rng(1).integers(4, 250, (2, 13))


def write_adapter(path, model, size=0.2, **kwargs):
  base = open_base.open_base(model)
  config = LoraConfig(rank=3, alpha=6.0, **kwargs)
  factors = jax.tree.map(lambda x: x * np.float32(size), peft_toy.make_lora(base.config, config))
  peft.write_adapter(path, factors, config, model)
  return config, factors


def model_logits(reference, lora=None):
  base = open_base.open_base(str(reference))
  return logits_toy.logits(base.config, base.load_params(), TOKENS, lora)


@pytest.mark.parametrize('to', ['hf', 'flax'])
@pytest.mark.parametrize('variant', [name for name in variants.VARIANTS if name.startswith('tiny')])
def test_converted_base_is_bit_equal(to, variant, tmp_path):
  reference = f'random:{variant}'
  result = convert.convert(reference, str(tmp_path / 'out'), to)
  again = open_base.open_base(str(tmp_path / 'out'))
  base = open_base.open_base(reference)
  assert again.config == base.config
  hf_toy.assert_trees_equal(again.load_params(), base.load_params())
  assert result['largest_logit_difference'] == 0.0
  assert result['parameters'] == pytree.num_params(base.load_params())
  assert result['files'] == sorted(p.name + '/' * p.is_dir() for p in (tmp_path / 'out').iterdir())
  assert [p.name for p in tmp_path.iterdir()] == ['out']


def test_nested_names(tmp_path):
  reference = 'random:tiny3'
  convert.convert(reference, str(tmp_path / 'out'), 'flax', nested=True)
  tree = ocp.PyTreeCheckpointer().restore(tmp_path / 'out' / 'params')
  assert tree['transformer']['layer_1']['mlp']['linear'].keys() == {'w'}
  again = open_base.open_base(str(tmp_path / 'out')).load_params()
  base = open_base.open_base(reference).load_params()
  hf_toy.assert_trees_equal(again, base)


def test_to_an_object_store_and_read_from_there(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))  # of the copies
  with gcs_toy.server():
    output = f'{gcs_toy.BUCKET}/model'
    result = convert.convert('random:tiny3', output, 'hf', verify=False)
    again = open_base.open_base(output)
    with pytest.raises(ValueError, match='model already exists'):
      convert.convert('random:tiny3', output, 'hf', verify=False)
  assert {p.name for p in again.files} < set(result['files'])
  assert 'config.json' in result['files']
  base = open_base.open_base('random:tiny3')
  hf_toy.assert_trees_equal(again.load_params(), base.load_params())


@pytest.mark.parametrize('family', hf_toy.FAMILIES)
def test_there_and_back_through_both_formats(family, tmp_path):
  """transformers' folder → Flax → HF: settings that no shape tells survive."""
  start = hf_toy.PARITY / family
  convert.convert(str(start), str(tmp_path / 'flax'), 'flax')
  convert.convert(str(tmp_path / 'flax'), str(tmp_path / 'hf'), 'hf')
  first, last = open_base.open_base(str(start)), open_base.open_base(str(tmp_path / 'hf'))
  assert first.config == last.config
  hf_toy.assert_trees_equal(last.load_params(), first.load_params())


@pytest.mark.parametrize('to', ['hf', 'flax'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_merged_model_computes_what_the_adapter_does(to, dtype, tmp_path):
  config, factors = write_adapter(tmp_path / 'a', 'random:tiny3', targets='all')
  result = convert.convert('random:tiny3', str(tmp_path / 'm'), to, str(tmp_path / 'a'), dtype)
  want = model_logits('random:tiny3', Lora(factors, np.float32(config.scale), config))
  got = model_logits(tmp_path / 'm')
  base = model_logits('random:tiny3')
  toy.assert_close(got, want, 1e-4 if dtype == 'float32' else 0.1)
  assert np.abs(want - base).max() > 1
  assert 0 < result['largest_logit_difference'] < 0.1
  assert '# LoRA adapter merged into its base' in (tmp_path / 'm' / 'README.md').read_text()
  record = json.loads((tmp_path / 'm' / 'conversion.json').read_text())
  assert record['largest_logit_difference'] == (result['largest_logit_difference'])
  assert record['adapter'] == str(tmp_path / 'a')
  assert record['dtype'] == dtype
  assert record['changed_tensors'] == 3 * 7
  rounding = 1e-6 if dtype == 'float32' else 2**-8
  assert 0 <= record['largest_weight_difference'] < 4 * rounding
  assert record['base_fingerprint'] == (open_base.open_base('random:tiny3').fingerprint())


@pytest.mark.parametrize('to', ['hf', 'peft'])
def test_magnitudes_are_converted(to, tmp_path):
  config, factors = write_adapter(tmp_path / 'a', 'random:tiny3', targets='q|down', dora=True)
  convert.convert('random:tiny3', str(tmp_path / 'm'), to, str(tmp_path / 'a'))
  params = open_base.open_base('random:tiny3').load_params()
  if to == 'hf':
    want = factors_lib.merge(params, factors, config.scale)
    got = open_base.open_base(str(tmp_path / 'm')).load_params()
  else:
    want = factors
    _, got = peft.read_adapter(tmp_path / 'm', variants.get('tiny3'))
  toy.assert_close(got, want, 1e-5)


def test_trained_base_leaves_are_merged(tmp_path):
  base = open_base.open_base('random:tiny')
  config = LoraConfig(rank=3, alpha=6.0, targets='q')
  factors = peft_toy.make_lora(base.config, config)
  shape = base.load_params()['layers']['attn']['v']['w'].shape
  trained = np.random.default_rng(5).standard_normal(shape, np.float32)
  peft.write_adapter(
    tmp_path / 'a', factors, config, 'b', {'layers': {'attn': {'v': {'w': trained}}}}
  )
  convert.convert('random:tiny', str(tmp_path / 'm'), 'hf', str(tmp_path / 'a'))
  got = open_base.open_base(str(tmp_path / 'm')).load_params()
  np.testing.assert_array_equal(got['layers']['attn']['v']['w'], trained)


def test_keras_factors_become_a_peft_folder(tmp_path):
  """Also without a PEFT folder to begin with; here from one of ranks N r."""
  write_adapter(tmp_path / 'a', 'random:tiny2', factorization='keras')
  result = convert.convert('random:tiny2', str(tmp_path / 'b'), 'peft', str(tmp_path / 'a'))
  config = open_base.open_base('random:tiny2').config
  want, got = (adapter_lib.read(tmp_path / name, config).factors for name in 'ab')
  hf_toy.assert_trees_equal(got, want)
  assert result['parameters'] == pytree.num_params(want)
  assert result['largest_logit_difference'] == 0.0
  assert (tmp_path / 'b' / 'conversion.json').is_file()


def test_adapter_that_changes_nothing_is_refused(tmp_path):
  base = open_base.open_base('random:tiny')
  config = LoraConfig(rank=3)
  factors = factors_lib.init(jax.random.key(0), base.config, config)
  peft.write_adapter(tmp_path / 'a', factors, config, 'b')
  with pytest.raises(ValueError, match='changes nothing'):
    convert.convert('random:tiny', str(tmp_path / 'm'), 'hf', str(tmp_path / 'a'))
  assert not (tmp_path / 'm').exists()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_untrained_magnitudes_are_refused(dtype, tmp_path):
  """Where B is zero, a row's length differs from its magnitude by rounding."""
  base = open_base.open_base('random:tiny3')
  config = LoraConfig(rank=3, targets='all', dora=True)
  factors = factors_lib.with_magnitudes(
    factors_lib.init(jax.random.key(0), base.config, config), base.load_params()
  )
  peft.write_adapter(tmp_path / 'a', factors, config, 'b')
  advice = 'train it first' if dtype == 'float32' else 'use --dtype=float32'
  with pytest.raises(ValueError, match=f'equal the base in {dtype}.*; .*{advice}'):
    convert.convert('random:tiny3', str(tmp_path / 'm'), 'hf', str(tmp_path / 'a'), dtype)
  assert not (tmp_path / 'm').exists()


@pytest.mark.parametrize('verify', [True, False])
def test_update_that_is_lost_in_rounding_is_refused(verify, tmp_path):
  """A bfloat16 base and an update far below its last bit."""
  convert.convert('random:tiny', str(tmp_path / 'b'), 'hf', dtype='bfloat16')
  write_adapter(tmp_path / 'a', 'random:tiny', size=1e-7)
  with pytest.raises(ValueError, match='equal the base in bfloat16'):
    convert.convert(
      str(tmp_path / 'b'), str(tmp_path / 'm'), 'hf', str(tmp_path / 'a'), verify=verify
    )
  assert sorted(p.name for p in tmp_path.iterdir()) == ['a', 'b']


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_what_rounding_leaves_of_an_update_is_said(dtype, tmp_path, caplog):
  """A bfloat16 base: an update below half its last bit is lost there."""
  convert.convert('random:tiny3', str(tmp_path / 'b'), 'hf', dtype='bfloat16')
  write_adapter(tmp_path / 'a', 'random:tiny3', 0.004, targets='all')
  with caplog.at_level(logging.WARNING):
    result = convert.convert(
      str(tmp_path / 'b'), str(tmp_path / 'm'), 'hf', str(tmp_path / 'a'), dtype
    )
  record = json.loads((tmp_path / 'm' / 'conversion.json').read_text())
  kept = result['update_kept'], result['logit_update_kept']
  assert kept == (record['update_kept'], record['logit_update_kept'])
  if dtype == 'float32':
    np.testing.assert_allclose(kept, 1, atol=1e-3)
    assert not caplog.records
  else:
    assert 0 < kept[0] < 0.9
    assert kept[1] < 0.9
    assert f'{kept[0]:.1%} in the weights, {kept[1]:.1%} in the ch' in caplog.text
    assert 'Use --dtype=float32' in caplog.text


def test_the_noise_of_the_base_is_no_loss_of_the_update(tmp_path, caplog):
  """A float32 base in bfloat16: its logits move further than the adapter's."""
  write_adapter(tmp_path / 'a', 'random:tiny3', 0.03)
  with caplog.at_level(logging.WARNING):
    result = convert.convert(
      'random:tiny3', str(tmp_path / 'm'), 'hf', str(tmp_path / 'a'), 'bfloat16'
    )
  assert not caplog.records
  record = json.loads((tmp_path / 'm' / 'conversion.json').read_text())
  assert abs(result['logit_update_kept'] - 1) < 0.1
  assert record['logit_update_kept'] == result['logit_update_kept']


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kept', [1.001, -0.02, 0.5])
def test_shares_are_said_as_shares(kept, dtype, caplog):
  record = {'update_kept': 1.0, 'logit_update_kept': kept, 'dtype': dtype}
  with caplog.at_level(logging.INFO):
    convert._warn_of_rounding(record)
  (message,) = caplog.messages
  share = {1.001: '100.0%', -0.02: '0.0%', 0.5: '50.0%'}[kept]
  assert f"100.0% in the weights, {share} in the check's logits" in message
  assert ('float32' in message.split('expected')[-1]) == (kept < 0.9 and dtype == 'bfloat16')


def test_the_share_of_an_update_is_that_in_its_direction(tmp_path):
  """Spelt out for one kernel, from what was written."""
  config, factors = write_adapter(tmp_path / 'a', 'random:tiny', 0.02)
  result = convert.convert(
    'random:tiny', str(tmp_path / 'm'), 'hf', str(tmp_path / 'a'), 'bfloat16'
  )
  base = open_base.open_base('random:tiny')
  merged_ = merged.merge(base, Lora(factors, np.float32(config.scale), config))
  product = square = 0.0
  for path, tensor in base.tensors.items():
    old = tensor.read(0, tensor.shape[0]).astype(np.float64)
    new = merged_.tensors[path].read(0, tensor.shape[0]).astype(np.float64)
    round_ = lambda x: x.astype(np.float32).astype('bfloat16').astype(float)
    product += np.vdot(round_(new) - round_(old), new - old)
    square += np.vdot(new - old, new - old)
  assert square > 0
  np.testing.assert_allclose(result['update_kept'], product / square, rtol=1e-4)


@pytest.mark.parametrize('to', ['hf', 'flax'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_output_of_other_weights_is_refused(to, dtype, tmp_path, monkeypatch):
  """A writer that puts one kernel in another's place leaves nothing behind."""
  writer = convert._write_model

  def wrong(new, base, *rest):
    tensors = dict(base.tensors)
    a, b = 'layer_0/mlp/gate/w', 'layer_0/mlp/up/w'
    tensors[a], tensors[b] = tensors[b], tensors[a]
    return writer(new, dataclasses.replace(base, tensors=tensors), *rest)

  monkeypatch.setattr(convert, '_write_model', wrong)
  with pytest.raises(ValueError, match='tensor layer_0/mlp/gate/w is not that'):
    convert.convert('random:tiny', str(tmp_path / 'm'), to, dtype=dtype)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('verify', [True, False])
def test_adapter_that_was_merged_in_part_is_refused(verify, tmp_path, monkeypatch):
  """In bfloat16, too little for the logits to tell; nothing is left behind."""
  write_adapter(tmp_path / 'a', 'random:tiny', size=0.002, targets='all')
  merge = merged.merge

  def in_part(source_, lora):
    result = merge(source_, lora)
    left = {'layer_1/mlp/up/w': source_.tensors['layer_1/mlp/up/w']}
    return dataclasses.replace(result, tensors={**result.tensors, **left})

  monkeypatch.setattr(merged, 'merge', in_part)
  with pytest.raises(ValueError, match='tensor layer_1/mlp/up/w differs'):
    convert.convert(
      'random:tiny', str(tmp_path / 'm'), 'hf', str(tmp_path / 'a'), 'bfloat16', verify=verify
    )
  assert [p.name for p in tmp_path.iterdir()] == ['a']


def test_output_that_computes_something_else_is_refused(tmp_path, monkeypatch):
  """The right weights, of a model whose heads attend otherwise."""
  writer = convert._write_model

  def wrong(new, base, *rest):
    config = dataclasses.replace(base.config, query_scale=1.0)
    return writer(new, dataclasses.replace(base, config=config), *rest)

  monkeypatch.setattr(convert, '_write_model', wrong)
  for dtype, advice in (('float32', 'written\\.$'), ('bfloat16', 'Use --dtype=float32')):
    with pytest.raises(ValueError, match=f'logits differ .* expected at most.*{advice}'):
      convert.convert('random:tiny2', str(tmp_path / 'm'), 'hf', dtype=dtype)
  assert not list(tmp_path.iterdir())


def test_output_that_another_conversion_wrote_meanwhile_is_kept(tmp_path, monkeypatch):
  writer = convert._write_model

  def slow(new, *rest):
    (tmp_path / 'm').mkdir()
    (tmp_path / 'm' / 'theirs').write_text('text')
    return writer(new, *rest)

  monkeypatch.setattr(convert, '_write_model', slow)
  with pytest.raises(ValueError, match='already exists'):
    convert.convert('random:tiny', str(tmp_path / 'm'), 'hf')
  assert [p.name for p in tmp_path.rglob('*')] == ['m', 'theirs']


def test_nan_is_not_taken_for_equal(tmp_path, monkeypatch):
  base = logits_toy.source_of(open_base.open_base('random:tiny').config)
  bad = StoredTensor('x', (34,), lambda i, j: np.full(j - i, np.nan, np.float32))
  broken = dataclasses.replace(base, tensors={**base.tensors, 'final_norm/scale': bad})
  real = open_base.open_base
  monkeypatch.setattr(open_base, 'open_base', lambda r, t='': broken if r == 'toy' else real(r, t))
  with pytest.raises(ValueError, match=r'model.norm.weight is nan at \[0\]'):
    convert.convert('toy', str(tmp_path / 'm'), 'hf')


def test_rows_of_the_flax_release(tmp_path):
  config = dataclasses.replace(
    open_base.open_base('random:tiny').config, vocab_size=256_000, embed_dim=6, num_layers=1
  )
  hf = tmp_path / 'hf'
  hf.mkdir()
  toy_base = logits_toy.source_of(config)
  hf_writer.write_folder(hf, toy_base)
  convert.convert(str(hf), str(tmp_path / 'flax'), 'flax')
  padded = open_base.open_base(str(tmp_path / 'flax'))
  assert padded.config.vocab_size == 256_128
  table = np.asarray(padded.load_params()['embedder']['input_embedding'])
  assert not table[256_000:].any()
  convert.convert(str(tmp_path / 'flax'), str(tmp_path / 'back'), 'hf')
  back = open_base.open_base(str(tmp_path / 'back'))
  assert back.config == config
  hf_toy.assert_trees_equal(back.load_params(), toy_base.load_params())


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'to': 'onnx'}, "to: got 'onnx', expected one of hf, flax, peft"),
    ({'to': 'peft'}, 'adapter: missing'),
    ({'to': 'peft', 'adapter': 'a', 'dtype': 'bfloat16'}, 'dtype: got'),
    ({'to': 'hf', 'adapter': 'nowhere'}, 'neither a file nor a folder'),
    ({'to': 'hf', 'dtype': 'float16'}, 'dtype: got float16'),
    ({'to': 'hf', 'model': 'random:none'}, 'variant: got'),
  ],
)
def test_arguments_that_do_not_fit(kwargs, message, tmp_path):
  kwargs = {'model': 'random:tiny', 'output': str(tmp_path / 'm'), **kwargs}
  with pytest.raises(ValueError, match=message):
    convert.convert(**kwargs)
  assert not list(tmp_path.iterdir())


def test_killed_conversion_leaves_no_output_and_the_next_one_works(tmp_path):
  """SIGKILL while the weights are written: a folder of another name is left."""
  program = """
import os, signal, sys
from gemma_jax.export import convert
from gemma_jax.formats import safetensors_file
writer = safetensors_file.write
def kill(*args):
  writer(*args)
  os.kill(os.getpid(), signal.SIGKILL)
safetensors_file.write = kill
convert.convert('random:tiny', sys.argv[1], 'hf')
"""
  output = tmp_path / 'm'
  killed = subprocess.run(
    [sys.executable, '-c', program, str(output)],
    cwd=Path(__file__).parents[2],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    check=False,
  )
  assert killed.returncode == -9
  (left,) = tmp_path.iterdir()
  assert left.match('.m.*.new')
  assert (left / 'model.safetensors').is_file()
  assert not output.exists()
  convert.convert('random:tiny', str(output), 'hf')
  assert [p.name for p in tmp_path.iterdir()] == ['m']


def test_what_is_there_is_not_replaced(tmp_path):
  (tmp_path / 'mine').write_text('text')
  for output in (tmp_path, tmp_path / 'mine'):
    with pytest.raises(ValueError, match='already exists'):
      convert.convert('random:tiny', str(output), 'hf')
  assert (tmp_path / 'mine').read_text() == 'text'


def test_command(tmp_path):
  command = [
    sys.executable,
    '-m',
    'launch.convert',
    '--model=random:tiny',
    '--to=hf',
    f'--output={tmp_path / "m"}',
    '--dtype=bfloat16',
    '--max_shard_bytes=30000',
  ]
  done = subprocess.run(
    command,
    capture_output=True,
    text=True,
    cwd=Path(__file__).parents[2],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    check=True,
  )
  (line,) = done.stdout.splitlines()
  result = json.loads(line)
  assert result['dtype'] == 'bfloat16'
  assert sum(f.endswith('.safetensors') for f in result['files']) > 1
  assert 0 < result['largest_logit_difference'] < 0.1
  again = subprocess.run(
    command,
    capture_output=True,
    text=True,
    cwd=Path(__file__).parents[2],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    check=False,
  )
  assert again.returncode == 1
  (line,) = again.stderr.splitlines()
  assert line.startswith('error: output:')


@pytest.mark.parametrize('to', ['hf', 'flax'])
def test_a_merged_model_is_asked_as_its_adapter_was_trained(to, tmp_path):
  model = tmp_path / 'base'
  config = dataclasses.replace(variants.TINY3, vocab_size=307)
  base = logits_toy.source_of(config)
  model.mkdir()
  hf_writer.write_folder(
    model,
    dataclasses.replace(
      base, make_tokenizer=lambda: logits_toy.make_tokenizer(logits_toy.tokenizer_proto())
    ),
  )
  write_adapter(tmp_path / 'a', str(model))
  TrainedWith('korean').write(tmp_path / 'a')
  convert.convert(str(model), str(tmp_path / 'out'), to, str(tmp_path / 'a'))
  out = open_base.open_base(str(tmp_path / 'out'))
  assert out.read_trained_with() == TrainedWith('korean')
  # Nor does it forget when it is converted once more.
  again = tmp_path / 'again'
  convert.convert(str(tmp_path / 'out'), str(again), 'hf')
  assert open_base.open_base(str(again)).read_trained_with() == TrainedWith('korean')
  for folder in (tmp_path / 'out', again):
    if folder == again or to == 'hf':
      template = (folder / 'chat_template.jinja').read_text()
      assert template == chat_template.jinja('korean')
  convert.convert(str(model), str(tmp_path / 'plain'), to)
  assert open_base.open_base(str(tmp_path / 'plain')).read_trained_with() is None


def base_with_added(folder, tokens):
  """A Hugging Face folder whose files name tokens behind tokenizer.model's."""
  folder.mkdir()
  base = logits_toy.source_of(dataclasses.replace(variants.TINY, vocab_size=307))
  proto = logits_toy.tokenizer_proto()
  hf_writer.write_folder(
    folder, dataclasses.replace(base, make_tokenizer=lambda: logits_toy.make_tokenizer(proto))
  )
  path = folder / 'tokenizer_config.json'
  config = json.loads(path.read_text())
  n = logits_toy.make_tokenizer(proto).vocab_size
  config['added_tokens_decoder'] |= {str(n + i): token for i, token in enumerate(tokens)}
  path.write_text(json.dumps(config))
  return n


def test_a_row_of_padding_that_has_a_token_stays(tmp_path, monkeypatch):
  """As with token 256000 of an embedding of 256128 rows."""
  n = base_with_added(tmp_path / 'base', [{'content': '<tool>', 'special': False}])
  monkeypatch.setattr(hf_writer, 'TOKEN_ROWS', {307: n})
  convert.convert(str(tmp_path / 'base'), str(tmp_path / 'out'), 'hf')
  base, out = (open_base.open_base(str(tmp_path / name)) for name in ('base', 'out'))
  assert out.config.vocab_size == n + 1
  assert out.tokenizer().encode('a<tool>')[1:] == [n]
  want = base.tensors['embedder/input_embedding'].read(0, n + 1)
  np.testing.assert_array_equal(out.tensors['embedder/input_embedding'].read(0, n + 1), want)


def test_an_output_of_another_tokenizer_is_refused(tmp_path, monkeypatch):
  base_with_added(tmp_path / 'base', [{'content': '<|tool|>', 'special': False}])
  # Read alone, tokenizer.model takes such a name for a control token.
  with pytest.raises(ValueError, match=r"its tokenizer has .*'<\|tool\|>', special=True.*--to=hf"):
    convert.convert(str(tmp_path / 'base'), str(tmp_path / 'out'), 'flax')
  convert.convert(str(tmp_path / 'base'), str(tmp_path / 'out'), 'hf')
  write = hf_writer.write_tokenizer

  def forgetful(folder, *rest):
    write(folder, *rest)
    (folder / 'tokenizer_config.json').unlink()

  monkeypatch.setattr(hf_writer, 'write_tokenizer', forgetful)
  with pytest.raises(ValueError, match='its tokenizer has 289 tokens, expected 290'):
    convert.convert(str(tmp_path / 'base'), str(tmp_path / 'again'), 'hf')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['base', 'out']
