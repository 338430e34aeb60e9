import dataclasses
import json
import os
from pathlib import Path
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_jax import layout, pytree
from gemma_jax.config import LoraConfig, ModelConfig
from gemma_jax.formats import hf_safetensors, peft

PARITY = Path(__file__).parent / 'golden' / 'parity'
STEM = 'base_model.model.model.layers'

MODEL = ModelConfig(
  vocab_size=53,
  embed_dim=11,
  hidden_dim=13,
  num_layers=3,
  num_heads=6,
  num_kv_heads=2,
  head_dim=14,
)


def make_lora(config, lora_config, seed=0, whole_numbers=False):
  """A scanned adapter tree with random factors, shapes spelt out here."""
  L, D, F = config.num_layers, config.embed_dim, config.hidden_dim
  N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
  r = lora_config.rank
  shapes = {
    'q': ('attn', (L, D, r), (L, r, N, H)),
    'k': ('attn', (L, D, r), (L, r, K, H)),
    'v': ('attn', (L, D, r), (L, r, K, H)),
    'o': ('attn', (L, N, H, r), (L, r, D)),
    'gate': ('mlp', (L, D, r), (L, r, F)),
    'up': ('mlp', (L, D, r), (L, r, F)),
    'down': ('mlp', (L, F, r), (L, r, D)),
  }
  if lora_config.factorization == 'keras':
    shapes['q'] = ('attn', (L, N, D, r), (L, r, H))
    shapes['k'] = shapes['v'] = ('attn', (L, K, D, r), (L, r, H))
  rng = np.random.default_rng(seed)
  if whole_numbers:
    draw = lambda shape: rng.integers(-4, 5, shape).astype(np.float32)
  else:
    draw = lambda shape: rng.standard_normal(shape, np.float32)
  tree = {}
  for name in lora_config.target_names:
    block, a, b = shapes[name]
    tree[f'layers/{block}/{name}/lora_a'] = draw(a)
    tree[f'layers/{block}/{name}/lora_b'] = draw(b)
  return pytree.unflatten(tree)


def assert_trees_equal(got, want):
  got, want = dict(pytree.items(got)), dict(pytree.items(want))
  assert got.keys() == want.keys()
  for name, x in want.items():
    assert got[name].dtype == np.float32
    np.testing.assert_array_equal(got[name], x, err_msg=name)


def peft_updates(folder):
  """Scaled B A of each module, by PEFT's own rules: {module: [out, in]}."""
  options = json.loads((folder / peft.CONFIG_NAME).read_text())
  tensors = load_file(folder / peft.WEIGHTS_NAME)

  def value(patterns, module, default):
    for pattern, x in patterns.items():
      if re.match(rf'(.*\.)?({pattern})$', module):
        return x
    return default

  updates = {}
  for name, a in tensors.items():
    if '.lora_A.' not in name:
      continue
    module = name.removeprefix('base_model.model.').split('.lora_A')[0]
    b = tensors[name.replace('lora_A', 'lora_B')]
    r = value(options['rank_pattern'], module, options['r'])
    alpha = value(options['alpha_pattern'], module, options['lora_alpha'])
    assert a.shape[0] == b.shape[1] == r, module
    scale = alpha / (r**0.5 if options['use_rslora'] else r)
    updates[module] = scale * (b.astype(np.float64) @ a.astype(np.float64))
  return updates


def our_updates(tree, lora_config, config):
  """The same from the tree: scale * A B as [out, in], spelt out."""
  D, F = config.embed_dim, config.hidden_dim
  N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
  keras = lora_config.factorization == 'keras'
  per_head = 'ndr,rh->nhd' if keras else 'dr,rnh->nhd'
  rules = {
    'attn/q': (per_head, (N * H, D)),
    'attn/k': (per_head, (K * H, D)),
    'attn/v': (per_head, (K * H, D)),
    'attn/o': ('nhr,rd->dnh', (D, N * H)),
    'mlp/gate': ('dr,rf->fd', (F, D)),
    'mlp/up': ('dr,rf->fd', (F, D)),
    'mlp/down': ('fr,rd->df', (D, F)),
  }
  leaves = {n: np.asarray(x, np.float64) for n, x in pytree.items(tree)}
  updates = {}
  for path in leaves:
    if not path.endswith('lora_a'):
      continue
    name = path.removeprefix('layers/').removesuffix('/lora_a')
    equation, shape = rules[name]
    for i in range(config.num_layers):
      product = np.einsum(equation, leaves[path][i], leaves[path[:-1] + 'b'][i])
      module = f'model.layers.{i}.{hf_safetensors.MODULES[name]}'
      updates[module] = lora_config.scale * product.reshape(shape)
  return updates


def assert_updates_equal(got, want, rtol=0.0):
  assert got.keys() == want.keys()
  for name, x in want.items():
    atol = rtol * np.abs(x).max()
    np.testing.assert_allclose(got[name], x, 0, atol, err_msg=name)


def read_base(family):
  folder = PARITY / family
  return hf_safetensors.open_folder(folder, str(folder)).config


@pytest.mark.parametrize('family', ['gemma1', 'gemma2', 'gemma3'])
@pytest.mark.parametrize('targets', ['qv', 'all'])
def test_adapter_that_peft_wrote(family, targets):
  config = read_base(family)
  folder = PARITY / family / f'adapter_{targets}'
  lora_config, lora = peft.read_adapter(folder, config)
  assert lora_config == LoraConfig(rank=4, alpha=8.0, targets=targets)
  assert_updates_equal(
    our_updates(lora, lora_config, config), peft_updates(folder), 1e-12
  )
  meta = json.loads((PARITY / family / 'meta.json').read_text())
  assert pytree.num_params(lora) == meta[f'{targets}.trainable']
  # One leaf against its tensor: kernel axes as in the base's own kernel.
  b = load_file(folder / peft.WEIGHTS_NAME)[
    f'{STEM}.1.self_attn.q_proj.lora_B.weight'
  ]
  got = lora['layers']['attn']['q']['lora_b'][1]
  assert got.shape == (4, config.num_heads, config.head_dim)
  np.testing.assert_array_equal(got[2, 3], b[48:64, 2])
  unrolled = peft.read_adapter(folder, config, scan_layers=False)[1]
  assert_trees_equal(unrolled, layout.unstack_layers(lora))


@pytest.mark.parametrize(
  ('rule', 'alpha', 'lora_alpha'),
  [
    ('alpha_over_r', 7.5, 7.5),
    ('alpha_over_sqrt_r', 16.0, 16),
    ('constant', 0.7, 0.7 * 5),
  ],
)
@pytest.mark.parametrize('targets', ['qv', 'all', 'k|o|down'])
def test_round_trip_is_exact(rule, alpha, lora_alpha, targets, tmp_path):
  config = LoraConfig(
    rank=5, alpha=alpha, scale_rule=rule, targets=targets, dropout=0.1
  )
  lora = make_lora(MODEL, config)
  folder = tmp_path / 'adapter'
  peft.write_adapter(folder, jax.tree.map(jnp.asarray, lora), config, 'b')
  got_config, got = peft.read_adapter(folder, MODEL)
  assert_trees_equal(got, lora)
  assert got_config.scale == config.scale
  assert (got_config.rank, got_config.dropout) == (5, 0.1)
  assert got_config.target_names == config.target_names
  assert_updates_equal(
    peft_updates(folder), our_updates(lora, config, MODEL), 1e-12
  )
  raw = json.loads((folder / peft.CONFIG_NAME).read_text())
  assert raw['lora_alpha'] == lora_alpha
  assert raw['use_rslora'] == (rule == 'alpha_over_sqrt_r')
  assert raw['rank_pattern'] == raw['alpha_pattern'] == {}

  peft.write_adapter(folder, layout.unstack_layers(lora), config, 'b')
  again_config, again = peft.read_adapter(folder, MODEL)
  assert_trees_equal(again, lora)
  assert again_config == got_config


def test_written_config_has_the_fields_peft_needs(tmp_path):
  config = LoraConfig(rank=5, alpha=10.0, targets='q|up')
  peft.write_adapter(tmp_path / 'a', make_lora(MODEL, config), config, 'gemma')
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
  }
  tensors = load_file(tmp_path / 'a' / peft.WEIGHTS_NAME)
  assert len(tensors) == 2 * 2 * MODEL.num_layers
  assert tensors[f'{STEM}.2.mlp.up_proj.lora_A.weight'].shape == (5, 11)
  assert tensors[f'{STEM}.2.mlp.up_proj.lora_B.weight'].shape == (13, 5)


@pytest.mark.parametrize(
  'rule', ['alpha_over_r', 'alpha_over_sqrt_r', 'constant']
)
def test_keras_factors_are_exported_exactly(rule, tmp_path):
  """Whole numbers: every product is exact, so nothing may differ at all."""
  config = LoraConfig(
    rank=4, alpha=8.0, scale_rule=rule, targets='all', factorization='keras'
  )
  lora = make_lora(MODEL, config, whole_numbers=True)
  folder = tmp_path / 'adapter'
  peft.write_adapter(folder, lora, config, 'base')
  want = our_updates(lora, config, MODEL)
  assert_updates_equal(peft_updates(folder), want)
  raw = json.loads((folder / peft.CONFIG_NAME).read_text())
  assert raw['r'] == 4
  assert raw['rank_pattern'] == {'q_proj': 24, 'k_proj': 8, 'v_proj': 8}
  got_config, got = peft.read_adapter(folder, MODEL)
  assert got_config.factorization == 'matrix'
  assert got_config.scale == config.scale
  assert got['layers']['attn']['q']['lora_a'].shape == (3, 11, 24)
  assert_updates_equal(our_updates(got, got_config, MODEL), want)


def edit(folder, **options):
  path = folder / peft.CONFIG_NAME
  path.write_text(json.dumps(json.loads(path.read_text()) | options))


def edit_tensors(folder, change):
  tensors = load_file(folder / peft.WEIGHTS_NAME)
  change(tensors)
  save_file(tensors, folder / peft.WEIGHTS_NAME)


@pytest.fixture
def adapter(tmp_path):
  """An adapter on q and v of MODEL, rank 5, alpha 10."""
  config = LoraConfig(rank=5, alpha=10.0, targets='qv')
  folder = tmp_path / 'adapter'
  peft.write_adapter(folder, make_lora(MODEL, config), config, 'base')
  return folder


def test_patterns_of_rank_and_alpha(adapter):
  """As PEFT reads them: v has another rank, q of layer 1 another scale."""

  def narrow(tensors):
    for i in range(3):
      for factor in 'AB':
        name = f'{STEM}.{i}.self_attn.v_proj.lora_{factor}.weight'
        part = tensors[name][:2] if factor == 'A' else tensors[name][:, :2]
        tensors[name] = np.ascontiguousarray(part)

  edit_tensors(adapter, narrow)
  edit(
    adapter,
    rank_pattern={'v_proj': 2},
    alpha_pattern={r'layers\.1\.self_attn\.q_proj': 30, '.*v_proj': 8},
  )
  config, lora = peft.read_adapter(adapter, MODEL)
  assert (config.rank, config.scale) == (5, 2.0)
  assert lora['layers']['attn']['v']['lora_a'].shape == (3, 11, 2)
  assert_updates_equal(
    our_updates(lora, config, MODEL), peft_updates(adapter), 1e-6
  )
  # The scale of q in layer 0 is the common one: its factor is untouched.
  stored = load_file(adapter / peft.WEIGHTS_NAME)[
    f'{STEM}.0.self_attn.q_proj.lora_B.weight'
  ]
  np.testing.assert_array_equal(
    lora['layers']['attn']['q']['lora_b'][0].reshape(5, -1).T, stored
  )


@pytest.mark.parametrize('use_rslora', [False, True])
def test_ranks_that_differ_between_layers_are_padded(adapter, use_rslora):
  def narrow(tensors):
    for factor in 'AB':
      name = f'{STEM}.2.self_attn.q_proj.lora_{factor}.weight'
      part = tensors[name][:3] if factor == 'A' else tensors[name][:, :3]
      tensors[name] = np.ascontiguousarray(part)

  edit_tensors(adapter, narrow)
  edit(
    adapter,
    use_rslora=use_rslora,
    rank_pattern={'model.layers.2.self_attn.q_proj': 3},
  )
  config, lora = peft.read_adapter(adapter, MODEL)
  q = lora['layers']['attn']['q']
  assert q['lora_a'].shape == (3, 11, 5)
  assert not q['lora_a'][2, :, 3:].any()
  assert not q['lora_b'][2, 3:].any()
  assert_updates_equal(
    our_updates(lora, config, MODEL), peft_updates(adapter), 1e-6
  )


def test_target_modules_as_a_regex(adapter):
  want = peft.read_adapter(adapter, MODEL)
  for pattern in (
    r'.*\.self_attn\.(q|v)_proj',
    r'model\.layers\.\d+\.self_attn\.[qv]_proj',
  ):
    edit(adapter, target_modules=pattern)
    got = peft.read_adapter(adapter, MODEL)
    assert got[0] == want[0]
    assert_trees_equal(got[1], want[1])
  edit(
    adapter, target_modules='all-linear', exclude_modules='.*([ko]|mlp.*)_proj'
  )
  assert_trees_equal(peft.read_adapter(adapter, MODEL)[1], want[1])


def test_adapter_of_a_multimodal_checkpoint(adapter):
  want = peft.read_adapter(adapter, MODEL)[1]
  edit_tensors(
    adapter,
    lambda tensors: [
      tensors.update(
        {name.replace('l.layers', 'l.language_model.layers'): tensors.pop(name)}
      )
      for name in list(tensors)
    ],
  )
  assert_trees_equal(peft.read_adapter(adapter, MODEL)[1], want)


def test_half_precision_adapter_is_read_as_float32(adapter):
  edit_tensors(
    adapter,
    lambda t: t.update({n: x.astype(np.float16) for n, x in t.items()}),
  )
  config, lora = peft.read_adapter(adapter, MODEL)
  assert {x.dtype for x in jax.tree.leaves(lora)} == {np.dtype(np.float32)}
  assert_updates_equal(
    our_updates(lora, config, MODEL), peft_updates(adapter), 1e-12
  )


@pytest.mark.parametrize(
  ('option', 'value'),
  [
    ('use_dora', True),
    ('bias', 'all'),
    ('modules_to_save', ['embed_tokens']),
    ('fan_in_fan_out', True),
    ('layers_to_transform', [0, 2]),
    ('layers_to_transform', 1),
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
    ('lora_dropout', None),
    ('target_modules', {'q_proj': 1}),
    ('target_modules', '(q_proj'),
    ('rank_pattern', {'q_proj': 0}),
    ('rank_pattern', {'(q_proj': 3}),
    ('alpha_pattern', ['q_proj']),
  ],
)
def test_unsupported_option_is_named(option, value, adapter):
  edit(adapter, **{option: value})
  with pytest.raises(ValueError, match=f'option {option} is') as e:
    peft.read_adapter(adapter, MODEL)
  assert str(adapter / peft.CONFIG_NAME) in str(e.value)
  assert '\n' not in str(e.value)


def test_options_that_say_nothing_are_accepted(adapter):
  want = peft.read_adapter(adapter, MODEL)
  edit(
    adapter,
    layers_to_transform=[0, 1, 2],
    lora_bias=False,
    an_option_of_the_future=None,
    megatron_core='megatron.core',
    init_lora_weights='gaussian',
  )
  got = peft.read_adapter(adapter, MODEL)
  assert got[0] == want[0]
  assert_trees_equal(got[1], want[1])


Q1A = f'{STEM}.1.self_attn.q_proj.lora_A.weight'
Q1B = Q1A.replace('_A', '_B')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda t: t.pop(Q1A), 'q_proj needs lora_A and lora_B'),
    (
      lambda t: t.update({Q1A: t[Q1A][:3]}),
      'q_proj needs lora_A and lora_B of one rank',
    ),
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
    (
      lambda t: t.update({Q1A.replace('.1.', '.3.'): t[Q1A]}),
      'for layer 3, but the base has 3',
    ),
    (
      lambda t: t.update({f'{STEM}.1.mlp.fc1.lora_A.weight': t[Q1A]}),
      r'mlp\.fc1\.lora_A\.weight is unexpected',
    ),
    (
      lambda t: t.update(
        {Q1A.replace('lora_A.weight', 'lora_magnitude_vector'): t[Q1A]}
      ),
      'lora_magnitude_vector is unexpected',
    ),
    (
      lambda t: t.update(
        {'base_model.model.model.embed_tokens.lora_embedding_A': t[Q1A]}
      ),
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
    (lambda t: t.clear(), 'there is no tensor'),
    (
      lambda t: t.update({Q1A: t[Q1A].astype(np.int32)}),
      'has dtype I32',
    ),
  ],
)
def test_tensors_must_fit_the_config_and_the_base(change, message, adapter):
  edit_tensors(adapter, change)
  with pytest.raises(ValueError, match=message) as e:
    peft.read_adapter(adapter, MODEL)
  assert str(adapter) in str(e.value)
  assert '\n' not in str(e.value)


def test_adapter_on_some_layers_only(adapter):
  edit_tensors(adapter, lambda t: (t.pop(Q1A), t.pop(Q1B)))
  edit(adapter, target_modules=r'.*v_proj|.*\.[02]\.self_attn\.q_proj')
  with pytest.raises(ValueError, match='but not in layer 1, expected all 3'):
    peft.read_adapter(adapter, MODEL)


def test_adapter_of_another_base_says_so(adapter):
  other = dataclasses.replace(MODEL, embed_dim=17)
  with pytest.raises(ValueError, match='belongs to another base'):
    peft.read_adapter(adapter, other)
  deeper = dataclasses.replace(MODEL, num_layers=5)
  with pytest.raises(ValueError, match=r'layers\.3\.self_attn\.q_proj, but'):
    peft.read_adapter(adapter, deeper)


def test_files_that_are_missing_or_broken(adapter, tmp_path):
  with pytest.raises(ValueError, match='there is no such file'):
    peft.read_adapter(tmp_path / 'nowhere', MODEL)
  edit(adapter, peft_type='LOHA')
  with pytest.raises(ValueError, match='peft_type'):
    peft.read_adapter(adapter, MODEL)
  (adapter / peft.CONFIG_NAME).write_text('[')
  with pytest.raises(ValueError, match='no valid JSON'):
    peft.read_adapter(adapter, MODEL)


def test_truncated_or_missing_weights(adapter):
  path = adapter / peft.WEIGHTS_NAME
  whole = path.read_bytes()
  for size in (0, 7, 500, len(whole) - 1):
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match='truncated'):
      peft.read_adapter(adapter, MODEL)
  path.unlink()
  with pytest.raises(ValueError, match='there is no such file'):
    peft.read_adapter(adapter, MODEL)


def write(folder, seed=0, **kwargs):
  config = LoraConfig(rank=5, alpha=10.0, targets='qv')
  lora = make_lora(MODEL, config, seed)
  peft.write_adapter(folder, lora, config, 'base', **kwargs)
  return lora


def test_replaced_adapter_leaves_nothing_behind(tmp_path):
  folder = tmp_path / 'deep' / 'adapter'
  write(folder)
  (folder / 'README.md').write_text('of the old one')
  second = write(folder, seed=1)
  assert_trees_equal(peft.read_adapter(folder, MODEL)[1], second)
  assert sorted(p.name for p in folder.iterdir()) == [
    peft.CONFIG_NAME,
    peft.WEIGHTS_NAME,
  ]
  assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize('step', ['fsync', 'rename', 'second rename'])
def test_failure_while_writing_keeps_the_old_adapter(
  step, tmp_path, monkeypatch
):
  folder = tmp_path / 'adapter'
  first = write(folder)
  name = step.split()[-1]
  real, calls = getattr(os, name), []

  def fail(*args):
    calls.append(args)
    if len(calls) == (2 if 'second' in step else 1):
      raise OSError('disk full')
    return real(*args)

  with monkeypatch.context() as patch:
    patch.setattr(os, name, fail)
    with pytest.raises(OSError, match='disk full'):
      write(folder, seed=1)
  assert_trees_equal(peft.read_adapter(folder, MODEL)[1], first)
  assert list(tmp_path.iterdir()) == [folder]


def test_writer_that_was_killed_is_cleaned_up_after(tmp_path, monkeypatch):
  """Killed while it wrote, or between its two renames: nothing is lost."""
  folder = tmp_path / 'adapter'
  first = write(folder)
  os.rename(folder, tmp_path / '.adapter.old')
  (tmp_path / '.adapter.new').mkdir()
  (tmp_path / '.adapter.new' / peft.CONFIG_NAME).write_text('{"half": ')
  with monkeypatch.context() as patch:
    patch.setattr(os, 'fsync', lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      write(folder, seed=1)
  assert_trees_equal(peft.read_adapter(folder, MODEL)[1], first)
  second = write(folder, seed=1)
  assert_trees_equal(peft.read_adapter(folder, MODEL)[1], second)
  assert list(tmp_path.iterdir()) == [folder]


def test_folder_with_something_else_is_not_replaced(tmp_path):
  folder = tmp_path / 'home'
  folder.mkdir()
  write(folder)  # an empty folder is as good as none
  (folder / peft.CONFIG_NAME).unlink()
  with pytest.raises(ValueError, match='something else than an adapter'):
    write(folder)
  (tmp_path / 'file').write_text('text')
  with pytest.raises(ValueError, match='something else than an adapter'):
    write(tmp_path / 'file')
  assert (tmp_path / 'file').read_text() == 'text'


def test_tree_that_is_no_adapter_is_refused(tmp_path):
  config = LoraConfig(rank=5, targets='qv')
  lora = make_lora(MODEL, config)
  del lora['layers']['attn']['q']['lora_b']
  with pytest.raises(ValueError, match='needs both lora_a and lora_b'):
    peft.write_adapter(tmp_path / 'a', lora, config, 'base')
  with pytest.raises(ValueError, match='is no lora_a or lora_b'):
    peft.write_adapter(
        tmp_path / 'a', {'layer_0': {'attn': {'q': {'w': np.ones(3)}}}},
        config, 'base',
    )  # fmt: skip
  with pytest.raises(ValueError, match='no factors'):
    peft.write_adapter(tmp_path / 'a', {}, config, 'base')
  assert not (tmp_path / 'a').exists()


def test_trained_base_leaves_travel_with_the_adapter(tmp_path):
  folder = tmp_path / 'adapter'
  leaf = jnp.arange(35, dtype=jnp.bfloat16).reshape(5, 7)
  write(folder, trained_base={'layers': {'attn': {'v': {'w': leaf}}}})
  got = peft.read_trained_base(folder)
  np.testing.assert_array_equal(got['layers']['attn']['v']['w'], leaf)
  assert (
    'do not compute the trained model' in (folder / 'README.md').read_text()
  )
  peft.read_adapter(folder, MODEL)
  write(folder)
  assert peft.read_trained_base(folder) == {}
  assert not (folder / 'README.md').exists()


@pytest.mark.parity
@pytest.mark.parametrize(
  ('factorization', 'rule', 'targets'),
  [
    ('matrix', 'alpha_over_r', 'qv'),
    ('matrix', 'alpha_over_sqrt_r', 'all'),
    ('matrix', 'constant', 'attention'),
    ('keras', 'alpha_over_r', 'qv'),
    ('keras', 'alpha_over_sqrt_r', 'all'),
  ],
)
@pytest.mark.parametrize('family', ['gemma1', 'gemma2', 'gemma3'])
def test_peft_itself_applies_what_was_written(
  family, factorization, rule, targets, tmp_path
):
  peft_package = pytest.importorskip('peft')
  transformers = pytest.importorskip('transformers')
  config = read_base(family)
  lora_config = LoraConfig(
    rank=3,
    alpha=6.0,
    scale_rule=rule,
    targets=targets,
    factorization=factorization,
  )
  lora = make_lora(config, lora_config)
  peft.write_adapter(tmp_path / 'a', lora, lora_config, family)
  base = transformers.AutoModelForCausalLM.from_pretrained(PARITY / family)
  model = peft_package.PeftModel.from_pretrained(base, tmp_path / 'a')
  got = {
    name.removeprefix('base_model.model.'): module.get_delta_weight('default')
    .detach()
    .numpy()
    for name, module in model.named_modules()
    if hasattr(module, 'get_delta_weight')
  }
  want = our_updates(lora, lora_config, config)
  assert got.keys() == want.keys()
  for name, x in want.items():
    np.testing.assert_allclose(got[name], x, 1e-5, 1e-5, err_msg=name)
