"""Adapters to test with, and their updates by PEFT's rules and by ours."""

import json
import re

import numpy as np
from safetensors.numpy import load_file, save_file

from gemma_jax import pytree
from gemma_jax.formats import hf_safetensors, peft
from gemma_jax.model.config import ModelConfig

STEM = 'base_model.model.model.layers'


MODEL = ModelConfig(
  vocab_size=53, embed_dim=11, hidden_dim=13, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=14
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
  magnitudes = {name: (L, *b[2:]) for name, (_, _, b) in shapes.items()}
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
    if lora_config.dora:
      tree[f'layers/{block}/{name}/lora_magnitude'] = draw(magnitudes[name])
  return pytree.unflatten(tree)


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


def edit(folder, **options):
  path = folder / peft.CONFIG_NAME
  path.write_text(json.dumps(json.loads(path.read_text()) | options))


def edit_tensors(folder, change):
  tensors = load_file(folder / peft.WEIGHTS_NAME)
  change(tensors)
  save_file(tensors, folder / peft.WEIGHTS_NAME)


def keep_layers(folder, layers):
  """Takes the tensors of all other layers away."""

  def change(tensors):
    for name in list(tensors):
      if int(name.removeprefix(f'{STEM}.').split('.')[0]) not in layers:
        del tensors[name]

  edit_tensors(folder, change)
