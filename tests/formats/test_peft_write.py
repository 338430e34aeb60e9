"""Adapters as they are written, and read again."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma_jax.config.train import LoraConfig
from gemma_jax.formats import model_card, peft
from gemma_jax.model import layout
from tests import hf_toy, peft_toy


def write(folder, seed=0, **kwargs):
  config = LoraConfig(rank=5, alpha=10.0, targets='qv')
  lora = peft_toy.make_lora(peft_toy.MODEL, config, seed)
  peft.write_adapter(folder, lora, config, 'base', **kwargs)
  return lora


@pytest.mark.parametrize(
  ('rule', 'alpha', 'lora_alpha'),
  [('alpha_over_r', 7.5, 7.5), ('alpha_over_sqrt_r', 16.0, 16), ('constant', 0.7, 0.7 * 5)],
)
@pytest.mark.parametrize('targets', ['qv', 'all', 'k|o|down'])
def test_round_trip_is_exact(rule, alpha, lora_alpha, targets, tmp_path):
  config = LoraConfig(rank=5, alpha=alpha, scale_rule=rule, targets=targets, dropout=0.1)
  lora = peft_toy.make_lora(peft_toy.MODEL, config)
  folder = tmp_path / 'adapter'
  peft.write_adapter(folder, jax.tree.map(jnp.asarray, lora), config, 'b')
  got_config, got = peft.read_adapter(folder, peft_toy.MODEL)
  hf_toy.assert_trees_equal(got, lora)
  assert got_config.scale == config.scale
  assert (got_config.rank, got_config.dropout) == (5, 0.1)
  assert got_config.target_names == config.target_names
  peft_toy.assert_updates_equal(
    peft_toy.peft_updates(folder), peft_toy.our_updates(lora, config, peft_toy.MODEL), 1e-12
  )
  raw = json.loads((folder / peft.CONFIG_NAME).read_text())
  assert raw['lora_alpha'] == lora_alpha
  assert raw['use_rslora'] == (rule == 'alpha_over_sqrt_r')
  assert raw['rank_pattern'] == raw['alpha_pattern'] == {}

  peft.write_adapter(folder, layout.unstack_layers(lora), config, 'b')
  again_config, again = peft.read_adapter(folder, peft_toy.MODEL)
  hf_toy.assert_trees_equal(again, lora)
  assert again_config == got_config


@pytest.mark.parametrize('rule', ['alpha_over_r', 'alpha_over_sqrt_r', 'constant'])
def test_keras_factors_are_exported_exactly(rule, tmp_path):
  """Whole numbers: every product is exact, so nothing may differ at all."""
  config = LoraConfig(rank=4, alpha=8.0, scale_rule=rule, targets='all', factorization='keras')
  lora = peft_toy.make_lora(peft_toy.MODEL, config, whole_numbers=True)
  folder = tmp_path / 'adapter'
  peft.write_adapter(folder, lora, config, 'base')
  want = peft_toy.our_updates(lora, config, peft_toy.MODEL)
  peft_toy.assert_updates_equal(peft_toy.peft_updates(folder), want)
  raw = json.loads((folder / peft.CONFIG_NAME).read_text())
  assert raw['r'] == 4
  assert raw['rank_pattern'] == {'q_proj': 24, 'k_proj': 8, 'v_proj': 8}
  got_config, got = peft.read_adapter(folder, peft_toy.MODEL)
  assert got_config.factorization == 'matrix'
  assert got_config.scale == config.scale
  assert got['layers']['attn']['q']['lora_a'].shape == (3, 11, 24)
  peft_toy.assert_updates_equal(peft_toy.our_updates(got, got_config, peft_toy.MODEL), want)


@pytest.mark.parametrize('name', ['q_proj', 'down_proj'])
def test_true_ranks_survive_a_round_trip(name, tmp_path):
  """Padded in the tree; in the file of each layer's own size again."""
  block, short = 'attn' if name == 'q_proj' else 'mlp', name[: -len('_proj')]
  config = LoraConfig(rank=5, alpha=10.0, targets='all', ranks={f'layer_2/{block}/{short}': 3})
  lora = peft_toy.make_lora(peft_toy.MODEL, config)
  leaf = lora['layers'][block][short]
  leaf['lora_a'][2, ..., 3:] = leaf['lora_b'][2, 3:] = 0
  folder = tmp_path / 'a'
  peft.write_adapter(folder, lora, config, 'base')
  module = f'layers.2.{"self_attn" if block == "attn" else "mlp"}.{name}'
  tensors = load_file(folder / peft.WEIGHTS_NAME)
  assert {n for n, x in tensors.items() if min(x.shape) == 3} == {
    f'base_model.model.model.{module}.lora_{f}.weight' for f in 'AB'
  }
  raw = json.loads((folder / peft.CONFIG_NAME).read_text())
  assert raw['rank_pattern'] == {f'model.{module}': 3}
  assert raw['alpha_pattern'] == {f'model.{module}': 6}
  assert raw['r'] == 5
  got_config, got = peft.read_adapter(folder, peft_toy.MODEL)
  assert got_config == config
  hf_toy.assert_trees_equal(got, lora)


@pytest.mark.parametrize('factorization', ['matrix', 'keras'])
def test_magnitudes_survive_a_round_trip(factorization, tmp_path):
  config = LoraConfig(rank=5, targets='q|o', factorization=factorization, dora=True)
  lora = peft_toy.make_lora(peft_toy.MODEL, config)
  peft.write_adapter(tmp_path / 'a', lora, config, 'base')
  tensors = load_file(tmp_path / 'a' / peft.WEIGHTS_NAME)
  written = tensors[f'{peft_toy.STEM}.1.self_attn.q_proj.lora_magnitude_vector']
  magnitude = lora['layers']['attn']['q']['lora_magnitude']
  assert magnitude.shape == (3, 6, 14)
  np.testing.assert_array_equal(written, magnitude[1].ravel())
  got_config, got = peft.read_adapter(tmp_path / 'a', peft_toy.MODEL)
  assert got_config.dora
  for name in ('q', 'o'):
    np.testing.assert_array_equal(
      got['layers']['attn'][name]['lora_magnitude'], lora['layers']['attn'][name]['lora_magnitude']
    )
  peft_toy.edit(tmp_path / 'a', use_dora=False)
  with pytest.raises(ValueError, match=r'use_dora is False, but .* a lora_'):
    peft.read_adapter(tmp_path / 'a', peft_toy.MODEL)


def test_factors_beyond_the_rank_are_refused(tmp_path):
  config = LoraConfig(rank=5, targets='qv', ranks={'layer_2/attn/q': 3})
  lora = peft_toy.make_lora(peft_toy.MODEL, config)
  with pytest.raises(ValueError, match='layer_2/attn/q has rank 3 but nonzero factors'):
    peft.write_adapter(tmp_path / 'a', lora, config, 'base')


@pytest.mark.parametrize('dora', [False, True])
def test_adapter_on_some_layers_only(dora, tmp_path):
  """Zero in the others, which are left out again when it is written."""
  config = LoraConfig(rank=5, alpha=10.0, targets='q|v|up', dora=dora, ranks={'.*/attn/v': 4})
  folder = tmp_path / 'adapter'
  lora = peft_toy.make_lora(peft_toy.MODEL, config)
  for leaf in jax.tree.leaves(lora):
    leaf[1] = 0
  v = lora['layers']['attn']['v']
  v['lora_a'], v['lora_b'] = v['lora_a'][..., :4], v['lora_b'][:, :4]
  lora['layers']['mlp']['up']['lora_a'][1] = 1  # as at the start of a run
  peft.write_adapter(folder, lora, config, 'base')
  raw = json.loads((folder / peft.CONFIG_NAME).read_text())
  assert raw['target_modules'] == [
    *(f'model.layers.0.self_attn.{x}_proj' for x in 'qv'),
    *(f'model.layers.2.self_attn.{x}_proj' for x in 'qv'),
    'up_proj',
  ]
  assert raw['rank_pattern'] == {'v_proj': 4}
  tensors = load_file(folder / peft.WEIGHTS_NAME)
  assert {n.split('.')[6] for n in tensors if '.layers.1.' in n} == {'up_proj'}
  got_config, got = peft.read_adapter(folder, peft_toy.MODEL)
  hf_toy.assert_trees_equal(got, lora)
  # A layer without an adapter has the rank that its zeros have.
  assert got_config.rank_of('layer_1/attn/v') == 4
  again = tmp_path / 'again'
  peft.write_adapter(again, got, got_config, 'base')
  for name in (peft.CONFIG_NAME, peft.WEIGHTS_NAME):
    assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_adapter_of_zeros_is_written_whole(tmp_path):
  config = LoraConfig(rank=5, targets='qv')
  lora = jax.tree.map(np.zeros_like, peft_toy.make_lora(peft_toy.MODEL, config))
  peft.write_adapter(tmp_path / 'a', lora, config, 'base')
  got = peft.read_adapter(tmp_path / 'a', peft_toy.MODEL)[1]
  hf_toy.assert_trees_equal(got, lora)


def test_replaced_adapter_leaves_nothing_behind(tmp_path):
  folder = tmp_path / 'deep' / 'adapter'
  write(folder, trained_base={'final_norm': {'scale': np.ones(11)}})
  second = write(folder, seed=1)
  got = peft.read_adapter(folder, peft_toy.MODEL)[1]
  hf_toy.assert_trees_equal(got, second)
  written = {p.name for p in folder.iterdir()}
  assert written == {peft.CONFIG_NAME, peft.WEIGHTS_NAME, model_card.NAME}


def test_folder_with_something_else_is_not_replaced(tmp_path):
  folder = tmp_path / 'home'
  folder.mkdir()
  write(folder)  # an empty folder is as good as none
  (folder / peft.CONFIG_NAME).unlink()
  with pytest.raises(ValueError, match='something other than an adapter'):
    write(folder)
  (tmp_path / 'file').write_text('text')
  with pytest.raises(ValueError, match='something other than an adapter'):
    write(tmp_path / 'file')
  assert (tmp_path / 'file').read_text() == 'text'


def test_tree_that_is_no_adapter_is_refused(tmp_path):
  config = LoraConfig(rank=5, targets='qv')
  lora = peft_toy.make_lora(peft_toy.MODEL, config)
  del lora['layers']['attn']['q']['lora_b']
  with pytest.raises(ValueError, match='needs both lora_a and lora_b'):
    peft.write_adapter(tmp_path / 'a', lora, config, 'base')
  with pytest.raises(ValueError, match='q/w does not belong to an adapter'):
    peft.write_adapter(
      tmp_path / 'a', {'layer_0': {'attn': {'q': {'w': np.ones(3)}}}}, config, 'base'
    )
  with pytest.raises(ValueError, match='no factors'):
    peft.write_adapter(tmp_path / 'a', {}, config, 'base')
  assert not (tmp_path / 'a').exists()


def test_trained_base_leaves_travel_with_the_adapter(tmp_path):
  folder = tmp_path / 'adapter'
  leaf = jnp.arange(35, dtype=jnp.bfloat16).reshape(5, 7)
  write(folder, trained_base={'layers': {'attn': {'v': {'w': leaf}}}})
  got = peft.read_trained_base(folder)
  np.testing.assert_array_equal(got['layers']['attn']['v']['w'], leaf)
  assert 'do not compute the trained' in (folder / 'README.md').read_text()
  peft.read_adapter(folder, peft_toy.MODEL)
  write(folder)
  assert peft.read_trained_base(folder) == {}
  assert 'do not compute' not in (folder / 'README.md').read_text()
