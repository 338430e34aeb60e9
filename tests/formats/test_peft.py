"""Adapters as they are read, of PEFT's making and of ours."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_jax import pytree
from gemma_jax.config.train import LoraConfig
from gemma_jax.export import convert, streamed
from gemma_jax.formats import hf_safetensors, open_base, peft
from gemma_jax.lora import matrices
from gemma_jax.model import layout
from tests import hf_toy, peft_toy, toy


def read_base(family):
  folder = hf_toy.PARITY / family
  return hf_safetensors.open_folder(folder, str(folder)).config


@pytest.mark.parametrize('family', ['gemma1', 'gemma2', 'gemma3'])
@pytest.mark.parametrize('targets', ['qv', 'all'])
def test_adapter_that_peft_wrote(family, targets):
  config = read_base(family)
  folder = hf_toy.PARITY / family / f'adapter_{targets}'
  lora_config, lora = peft.read_adapter(folder, config)
  assert lora_config == LoraConfig(rank=4, alpha=8.0, targets=targets)
  peft_toy.assert_updates_equal(
    peft_toy.our_updates(lora, lora_config, config), peft_toy.peft_updates(folder), 1e-12
  )
  meta = json.loads((hf_toy.PARITY / family / 'meta.json').read_text())
  assert pytree.num_params(lora) == meta[f'{targets}.trainable']
  # One leaf against its tensor: kernel axes as in the base's own kernel.
  b = load_file(folder / peft.WEIGHTS_NAME)[f'{peft_toy.STEM}.1.self_attn.q_proj.lora_B.weight']
  got = lora['layers']['attn']['q']['lora_b'][1]
  assert got.shape == (4, config.num_heads, config.head_dim)
  np.testing.assert_array_equal(got[2, 3], b[48:64, 2])
  unrolled = peft.read_adapter(folder, config, scan_layers=False)[1]
  hf_toy.assert_trees_equal(unrolled, layout.unstack_layers(lora))


@pytest.mark.parametrize(
  ('family', 'tag'),
  [('gemma1', 'patterns'), ('gemma2', 'qv'), ('gemma3', 'all'), ('gemma3', 'dora')],
)
@pytest.mark.parametrize('to', ['hf', 'flax'])
def test_adapter_that_peft_wrote_is_merged_as_peft_does(family, tag, to, tmp_path):
  """By the command: the output's logits are those of merge_and_unload."""
  folder = hf_toy.PARITY / family
  convert.convert(str(folder), str(tmp_path / 'm'), to, str(folder / f'adapter_{tag}'))
  batch = load_file(folder / 'ref_base.safetensors')
  merged = open_base.open_base(str(tmp_path / 'm'))
  got = streamed.logits(merged, batch['input_ids'].astype(np.int32))
  want = load_file(folder / f'ref_{tag}.safetensors')['merged_logits']
  is_real = batch['attention_mask'].astype(bool)
  toy.assert_close(got[is_real][:, : want.shape[-1]], want[is_real], 1e-4)


@pytest.mark.parametrize('factorization', ['matrix', 'keras'])
def test_keras_factors_as_matrices_make_the_same_update(factorization):
  config = LoraConfig(rank=4, alpha=8.0, targets='all', factorization=factorization)
  lora = peft_toy.make_lora(peft_toy.MODEL, config, whole_numbers=True)
  got = matrices.as_matrix(lora, config, peft_toy.MODEL)
  matrix = dataclasses.replace(config, factorization='matrix')
  peft_toy.assert_updates_equal(
    peft_toy.our_updates(got, matrix, peft_toy.MODEL),
    peft_toy.our_updates(lora, config, peft_toy.MODEL),
  )
  if factorization == 'matrix':
    hf_toy.assert_trees_equal(got, lora)


@pytest.fixture
def adapter(tmp_path):
  """An adapter on q and v of peft_toy.MODEL, rank 5, alpha 10."""
  config = LoraConfig(rank=5, alpha=10.0, targets='qv')
  folder = tmp_path / 'adapter'
  peft.write_adapter(folder, peft_toy.make_lora(peft_toy.MODEL, config), config, 'base')
  return folder


@pytest.mark.parametrize('use_rslora', [False, True])
def test_ranks_that_differ_between_layers_are_padded(adapter, use_rslora):
  def narrow(tensors):
    for factor in 'AB':
      name = f'{peft_toy.STEM}.2.self_attn.q_proj.lora_{factor}.weight'
      part = tensors[name][:3] if factor == 'A' else tensors[name][:, :3]
      tensors[name] = np.ascontiguousarray(part)

  peft_toy.edit_tensors(adapter, narrow)
  peft_toy.edit(adapter, use_rslora=use_rslora, rank_pattern={'model.layers.2.self_attn.q_proj': 3})
  config, lora = peft.read_adapter(adapter, peft_toy.MODEL)
  q = lora['layers']['attn']['q']
  assert q['lora_a'].shape == (3, 11, 5)
  assert not q['lora_a'][2, :, 3:].any()
  assert not q['lora_b'][2, 3:].any()
  peft_toy.assert_updates_equal(
    peft_toy.our_updates(lora, config, peft_toy.MODEL), peft_toy.peft_updates(adapter), 1e-6
  )


@pytest.mark.parametrize('option', ['rank_pattern', 'alpha_pattern'])
def test_pattern_that_matches_nothing_is_refused(option, adapter):
  pattern = r'layers\.3\.self_attn\.q_proj'
  peft_toy.edit(adapter, **{option: {pattern: 5}})
  with pytest.raises(ValueError, match=f"{option} '.*' matches no module"):
    peft.read_adapter(adapter, peft_toy.MODEL)


def test_adapter_of_a_multimodal_checkpoint(adapter):
  want = peft.read_adapter(adapter, peft_toy.MODEL)[1]
  peft_toy.edit_tensors(
    adapter,
    lambda tensors: [
      tensors.update({name.replace('l.layers', 'l.language_model.layers'): tensors.pop(name)})
      for name in list(tensors)
    ],
  )
  hf_toy.assert_trees_equal(peft.read_adapter(adapter, peft_toy.MODEL)[1], want)


def test_half_precision_adapter_is_read_as_float32(adapter):
  peft_toy.edit_tensors(
    adapter, lambda t: t.update({n: x.astype(np.float16) for n, x in t.items()})
  )
  config, lora = peft.read_adapter(adapter, peft_toy.MODEL)
  assert {x.dtype for x in jax.tree.leaves(lora)} == {np.dtype(np.float32)}
  peft_toy.assert_updates_equal(
    peft_toy.our_updates(lora, config, peft_toy.MODEL), peft_toy.peft_updates(adapter), 1e-12
  )


Q1A = f'{peft_toy.STEM}.1.self_attn.q_proj.lora_A.weight'


Q1B = Q1A.replace('_A', '_B')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda t: t.pop(Q1A), 'q_proj needs lora_A and lora_B'),
    (lambda t: t.update({Q1A: t[Q1A][:3]}), 'q_proj needs lora_A and lora_B of one rank'),
    (
      lambda t: (t.pop(Q1A), t.pop(Q1B)),
      r'selects model\.layers\.1\.self_attn\.q_proj, but .* none',
    ),
    (
      lambda t: t.update({Q1A: t[Q1A][:, :7].copy()}),
      r'lora_A\.weight has shape \[5, 7\], expected \[r, 11\]',
    ),
    (
      lambda t: t.update({Q1B: t[Q1B][:70]}),
      r'lora_B\.weight has shape \[70, 5\], expected \[84, r\]',
    ),
    (
      lambda t: t.update({Q1A: t[Q1A][:3], Q1B: t[Q1B][:, :3].copy()}),
      'is 5, but its tensors have 3',
    ),
    (lambda t: t.update({Q1A.replace('.1.', '.3.'): t[Q1A]}), 'for layer 3, but the base has 3'),
    (
      lambda t: t.update({f'{peft_toy.STEM}.1.mlp.fc1.lora_A.weight': t[Q1A]}),
      r'mlp\.fc1\.lora_A\.weight is unexpected',
    ),
    (
      lambda t: t.update({Q1A.replace('lora_A.weight', 'lora_magnitude_vector'): t[Q1A][0]}),
      r'lora_magnitude_vector has shape \[11\], expected \[84\]',
    ),
    (
      lambda t: t.update({'base_model.model.model.embed_tokens.lora_embedding_A': t[Q1A]}),
      'lora_embedding_A is unexpected',
    ),
    (
      lambda t: t.update(
        {
          n.replace('q_proj', 'k_proj'): x if '_A' in n else x[:28]
          for n, x in list(t.items())
          if 'q_proj' in n
        }
      ),
      r'leaves out model\.layers\.0\.self_attn\.k_proj, but',
    ),
    (lambda t: t.clear(), 'it has no tensors'),
    (lambda t: t.update({Q1A: t[Q1A].astype(np.int32)}), 'has dtype I32'),
  ],
)
def test_tensors_must_fit_the_config_and_the_base(change, message, adapter):
  peft_toy.edit_tensors(adapter, change)
  with pytest.raises(ValueError, match=message) as e:
    peft.read_adapter(adapter, peft_toy.MODEL)
  assert str(adapter) in str(e.value)
  assert '\n' not in str(e.value)


def test_adapter_of_another_base_says_so(adapter):
  other = dataclasses.replace(peft_toy.MODEL, embed_dim=17)
  with pytest.raises(ValueError, match='belongs to another base'):
    peft.read_adapter(adapter, other)
  deeper = dataclasses.replace(peft_toy.MODEL, num_layers=5)
  with pytest.raises(ValueError, match=r'layers\.3\.self_attn\.q_proj, but'):
    peft.read_adapter(adapter, deeper)


def test_files_that_are_missing_or_broken(adapter, tmp_path):
  with pytest.raises(ValueError, match='there is no such file'):
    peft.read_adapter(tmp_path / 'nowhere', peft_toy.MODEL)
  peft_toy.edit(adapter, peft_type='LOHA')
  with pytest.raises(ValueError, match='peft_type'):
    peft.read_adapter(adapter, peft_toy.MODEL)
  (adapter / peft.CONFIG_NAME).write_text('[')
  with pytest.raises(ValueError, match='cannot be read as JSON'):
    peft.read_adapter(adapter, peft_toy.MODEL)


@pytest.mark.parametrize('prefix', ['', 'model.'])
def test_the_language_part_of_an_adapter_with_vision_factors(adapter, prefix, caplog):
  want = peft.read_adapter(adapter, peft_toy.MODEL)
  layer = 'vision_tower.vision_model.encoder.layers.2.self_attn'

  def add(tensors):
    for name in ('q_proj', 'out_proj'):
      stem = f'base_model.model.{prefix}{layer}.{name}.lora_'
      tensors |= {f'{stem}A.weight': np.ones((5, 7), np.float32)}
      tensors |= {f'{stem}B.weight': np.ones((9, 5), np.float32)}

  peft_toy.edit_tensors(adapter, add)
  peft_toy.edit(adapter, rank_pattern={'out_proj': 5})
  caplog.set_level('INFO')
  got = peft.read_adapter(adapter, peft_toy.MODEL)
  assert got[0] == want[0]
  hf_toy.assert_trees_equal(got[1], want[1])
  words = f'leaves out what is not of the language model: {prefix}vision_tower.* x 4'
  assert words in caplog.text
  peft_toy.edit_tensors(
    adapter, lambda tensors: [tensors.pop(n) for n in [*tensors] if 'vision' not in n]
  )
  with pytest.raises(ValueError, match='has only those of a vision tower'):
    peft.read_adapter(adapter, peft_toy.MODEL)


@pytest.mark.parametrize('other', ['final_norm/scale', 'final_norm'])
def test_a_trained_leaf_that_the_base_cannot_have(adapter, other):
  """A scalar; a leaf where others lie below it."""
  shape = () if '/' in other else (11,)
  leaves = {'final_norm/scale': np.ones(11, np.float32), other: np.ones(shape, np.float32)}
  save_file(leaves, adapter / peft.TRAINED_BASE_NAME)
  with pytest.raises(ValueError, match=rf'trained_base\.safetensors: tensor {other} has shape'):
    peft.read_trained_base(adapter)


def test_truncated_or_missing_weights(adapter):
  path = adapter / peft.WEIGHTS_NAME
  whole = path.read_bytes()
  for size in (0, 7, 500, len(whole) - 1):
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match='truncated'):
      peft.read_adapter(adapter, peft_toy.MODEL)
  path.unlink()
  with pytest.raises(ValueError, match='there is no such file'):
    peft.read_adapter(adapter, peft_toy.MODEL)
