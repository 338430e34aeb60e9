"""adapter_config.json: what is read, and what is refused."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma_jax.config.train import LoraConfig
from gemma_jax.formats import peft, peft_config
from tests import hf_toy, peft_toy


@pytest.fixture
def adapter(tmp_path):
  """An adapter on q and v of peft_toy.MODEL, rank 5, alpha 10."""
  config = LoraConfig(rank=5, alpha=10.0, targets='qv')
  folder = tmp_path / 'adapter'
  peft.write_adapter(folder, peft_toy.make_lora(peft_toy.MODEL, config), config, 'base')
  return folder


def test_written_config_has_the_fields_peft_needs(tmp_path):
  config = LoraConfig(rank=5, alpha=10.0, targets='q|up')
  peft.write_adapter(tmp_path / 'a', peft_toy.make_lora(peft_toy.MODEL, config), config, 'gemma')
  assert json.loads((tmp_path / 'a' / peft.CONFIG_NAME).read_text()) == {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': 'gemma',
    'r': 5,
    'lora_alpha': 10,
    'lora_dropout': 0.0,
    'target_modules': ['q_proj', 'up_proj'],
    'bias': 'none',
    'use_rslora': False,
    'use_dora': False,
    'rank_pattern': {},
    'alpha_pattern': {},
    'fan_in_fan_out': False,
    'init_lora_weights': True,
    'inference_mode': True,
    'layers_to_transform': None,
    'modules_to_save': None,
    'revision': None,
  }
  tensors = load_file(tmp_path / 'a' / peft.WEIGHTS_NAME)
  assert len(tensors) == 2 * 2 * peft_toy.MODEL.num_layers
  assert tensors[f'{peft_toy.STEM}.2.mlp.up_proj.lora_A.weight'].shape == (5, 11)
  assert tensors[f'{peft_toy.STEM}.2.mlp.up_proj.lora_B.weight'].shape == (13, 5)


def test_patterns_of_rank_and_alpha(adapter):
  """As PEFT reads them: v has another rank, q of layer 1 another scale."""

  def narrow(tensors):
    for i in range(3):
      for factor in 'AB':
        name = f'{peft_toy.STEM}.{i}.self_attn.v_proj.lora_{factor}.weight'
        part = tensors[name][:2] if factor == 'A' else tensors[name][:, :2]
        tensors[name] = np.ascontiguousarray(part)

  peft_toy.edit_tensors(adapter, narrow)
  peft_toy.edit(
    adapter,
    rank_pattern={'v_proj': 2},
    alpha_pattern={r'layers\.1\.self_attn\.q_proj': 30, '.*v_proj': 8},
  )
  config, lora = peft.read_adapter(adapter, peft_toy.MODEL)
  assert (config.rank, config.scale) == (5, 2.0)
  assert lora['layers']['attn']['v']['lora_a'].shape == (3, 11, 2)
  peft_toy.assert_updates_equal(
    peft_toy.our_updates(lora, config, peft_toy.MODEL), peft_toy.peft_updates(adapter), 1e-6
  )
  # The scale of q in layer 0 is the common one: its factor is untouched.
  stored = load_file(adapter / peft.WEIGHTS_NAME)[
    f'{peft_toy.STEM}.0.self_attn.q_proj.lora_B.weight'
  ]
  np.testing.assert_array_equal(lora['layers']['attn']['q']['lora_b'][0].reshape(5, -1).T, stored)


def test_target_modules_as_a_regex(adapter):
  want = peft.read_adapter(adapter, peft_toy.MODEL)
  for pattern in (r'.*\.self_attn\.(q|v)_proj', r'model\.layers\.\d+\.self_attn\.[qv]_proj'):
    peft_toy.edit(adapter, target_modules=pattern)
    got = peft.read_adapter(adapter, peft_toy.MODEL)
    assert got[0] == want[0]
    hf_toy.assert_trees_equal(got[1], want[1])
  peft_toy.edit(adapter, target_modules='all-linear', exclude_modules='.*([ko]|mlp.*)_proj')
  hf_toy.assert_trees_equal(peft.read_adapter(adapter, peft_toy.MODEL)[1], want[1])


@pytest.mark.parametrize(
  ('option', 'value'),
  [
    ('bias', 'all'),
    ('modules_to_save', ['embed_tokens']),
    ('fan_in_fan_out', True),
    ('init_lora_weights', 1),
    ('layers_to_transform', [[0], 1, 2]),
    ('layers_to_transform', [0, True, 2]),
    ('layers_to_transform', -1),
    ('layers_to_transform', '012'),
    ('use_dora', 'false'),
    ('use_rslora', 'false'),
    ('use_rslora', 2),
    ('use_dora', 0),
    ('r', 10**400),
    ('lora_alpha', 10**400),
    ('alpha_pattern', {'q_proj': -(10**400)}),
    ('layer_replication', [[0, 2]]),
    ('trainable_token_indices', [3]),
    ('lora_bias', True),
    ('an_option_of_the_future', {'a': 1}),
    ('init_lora_weights', 'pissa'),
    ('r', 0),
    ('r', 2.5),
    ('r', None),
    ('lora_alpha', '16'),
    ('lora_alpha', float('nan')),
    ('lora_alpha', 1e39),
    ('lora_dropout', None),
    ('target_modules', {'q_proj': 1}),
    ('target_modules', [[0]]),
    ('target_modules', 0),
    ('target_modules', '(q_proj'),
    ('target_modules', 'a{99999999999999}'),
    ('target_modules', '(' * 5000 + ')' * 5000),
    ('exclude_modules', False),
    ('rank_pattern', []),
    ('rank_pattern', {'(?i)q_proj': 5}),
    ('rank_pattern', {'q_proj': 0}),
    ('rank_pattern', {'(q_proj': 3}),
    ('alpha_pattern', ['q_proj']),
  ],
)
def test_unsupported_option_is_named(option, value, adapter):
  peft_toy.edit(adapter, **{option: value})
  with pytest.raises(ValueError, match=f'option {option} is') as e:
    peft.read_adapter(adapter, peft_toy.MODEL)
  assert str(adapter / peft.CONFIG_NAME) in str(e.value)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  ('option', 'value', 'remedy'),
  [
    ('modules_to_save', ['embed_tokens'], r'\.merge_and_unload\(\)\.save_pretrained\(OUTPUT\)'),
    ('trainable_token_indices', [3], r'and give OUTPUT as the model'),
    ('lora_bias', True, 'no bias that it could be merged into'),
  ],
)
def test_the_way_out_is_said(option, value, remedy, adapter):
  peft_toy.edit(adapter, **{option: value})
  with pytest.raises(ValueError, match=rf'option {option} is .*{remedy}'):
    peft.read_adapter(adapter, peft_toy.MODEL)


@pytest.mark.parametrize(
  'options',
  [
    {'lora_alpha': 0},
    {'lora_alpha': -3},
    {'lora_alpha': 0, 'use_rslora': True},
    {'lora_alpha': 0, 'alpha_pattern': {'v_proj': 7}},
    {'alpha_pattern': {'v_proj': 0}},
  ],
)
def test_a_scale_of_zero_or_less(options, adapter):
  """The factors take it, since a config's scale is positive."""
  peft_toy.edit(adapter, **options)
  config, lora = peft.read_adapter(adapter, peft_toy.MODEL)
  assert config.scale > 0
  peft_toy.assert_updates_equal(
    peft_toy.our_updates(lora, config, peft_toy.MODEL), peft_toy.peft_updates(adapter), 1e-6
  )


@pytest.mark.parametrize(
  ('options', 'layers'),
  [
    ({'layers_to_transform': [0, 2]}, {0, 2}),
    ({'layers_to_transform': 1, 'layers_pattern': 'layers'}, {1}),
    ({'layers_to_transform': [2, 40], 'layers_pattern': ['layers']}, {2}),
    ({'layers_to_transform': []}, {0, 1, 2}),
    ({'target_modules': r'.*\.[02]\.self_attn\.[qv]_proj'}, {0, 2}),
    # PEFT asks for the layer only where the name does not say it.
    (
      {
        'layers_to_transform': [1],
        'target_modules': [
          'v_proj',
          'q_proj',
          'model.layers.2.self_attn.q_proj',
          'model.layers.2.self_attn.v_proj',
        ],
      },
      {1, 2},
    ),
  ],
)
def test_layers_that_are_adapted(options, layers, adapter):
  whole = peft.read_adapter(adapter, peft_toy.MODEL)[1]
  peft_toy.edit(adapter, **options)
  if layers != {0, 1, 2}:
    with pytest.raises(ValueError, match=r'target_modules.* leaves out model'):
      peft.read_adapter(adapter, peft_toy.MODEL)
  peft_toy.keep_layers(adapter, layers)
  config, lora = peft.read_adapter(adapter, peft_toy.MODEL)
  assert config == LoraConfig(rank=5, alpha=10.0, targets='qv')
  mask = np.isin(range(3), list(layers))
  hf_toy.assert_trees_equal(lora, jax.tree.map(lambda x: (x.T * mask).T, whole))


def test_layers_of_another_name_are_refused(adapter):
  peft_toy.edit(adapter, layers_to_transform=[0], layers_pattern='blocks')
  with pytest.raises(ValueError, match='option layers_pattern is'):
    peft.read_adapter(adapter, peft_toy.MODEL)


def test_options_that_say_nothing_are_accepted(adapter):
  want = peft.read_adapter(adapter, peft_toy.MODEL)
  peft_toy.edit(
    adapter,
    layers_to_transform=[0, 1, 2],
    lora_bias=False,
    an_option_of_the_future=None,
    megatron_core='megatron.core',
    init_lora_weights='gaussian',
  )
  got = peft.read_adapter(adapter, peft_toy.MODEL)
  assert got[0] == want[0]
  hf_toy.assert_trees_equal(got[1], want[1])


@pytest.mark.parametrize(
  ('reference', 'name', 'revision'),
  [
    ('gemma3_270m', 'google/gemma-3-270m', None),
    ('hf:google/gemma-2b', 'google/gemma-2b', None),
    ('hf:google/gemma-2b@9cf48e52', 'google/gemma-2b', '9cf48e52'),
    ('models/gemma-2b', 'models/gemma-2b', None),
  ],
)
def test_base_is_named_as_other_tools_name_it(reference, name, revision):
  raw = peft_config.to_json({'q_proj': 4}, ['q_proj'], LoraConfig(rank=4), reference)
  assert raw['base_model_name_or_path'] == name
  assert raw['revision'] == revision
