"""LoRA adapters in PEFT's layout, read and written without loss.

    adapter_config.json         r, lora_alpha, target_modules, ...
    adapter_model.safetensors   ...layers.i.self_attn.q_proj.lora_A.weight
                                (r, inputs), .lora_B.weight (outputs, r)
    trained_base.safetensors    ours, only if base leaves were trained too

PEFT scales B A by lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora;
`rank_pattern` and `alpha_pattern` override r and lora_alpha by module.
"""

import json
import math
import os
from pathlib import Path
import re

import jax
import numpy as np

from gemma_jax import files, layout, pytree
from gemma_jax.config import LoraConfig
from gemma_jax.formats import (
  atomic_folder,
  base,
  hf_safetensors,
  peft_config,
  safetensors_file,
)
from gemma_jax.model_config import ModelConfig

CONFIG_NAME = 'adapter_config.json'
WEIGHTS_NAME = 'adapter_model.safetensors'
TRAINED_BASE_NAME = 'trained_base.safetensors'

_PATHS = {module: path for path, module in hf_safetensors.MODULES.items()}

# The part before `layers` differs for adapters of multimodal checkpoints.
_TENSOR = re.compile(
  r'base_model\.model\.'
  r'(?P<module>(?:model\.|language_model\.model\.|model\.language_model\.)'
  r'layers\.(?P<layer>\d+)\.(?P<name>\w+\.\w+))'
  r'\.lora_(?P<factor>[AB])\.weight'
)
_LEAF = re.compile(r'layer_(\d+)/((?:attn|mlp)/\w+)/lora_([ab])')

# Module name in the base, A [r, inputs] and B [outputs, r].
Factors = tuple[str, np.ndarray, np.ndarray]


def read_adapter(
  folder: str | os.PathLike, model_config: ModelConfig, scan_layers: bool = True
) -> tuple[LoraConfig, pytree.Tree]:
  """Reads an adapter for a base of this architecture.

  The factorization is `matrix`. Leaves of different projections may differ in
  rank (the leaf's shape says it); ranks that differ between the layers of a
  projection are padded with zeros to the largest. Where a module's scale is not
  the adapter's common one, the ratio is multiplied into its lora_b.

  Args:
    folder: holds adapter_config.json and adapter_model.safetensors.
    model_config: the base's architecture.
    scan_layers: leaves for all layers (`layers/...` [L, ...]) or for each.

  Returns:
    (LoraConfig, whose `scale` belongs to the factors; nested dicts of float32
    NumPy arrays, e.g. layers/attn/q/lora_a [L, D, r], lora_b [L, r, N, H]).

  Raises:
    ValueError: missing or broken files, an option of PEFT that is not
      supported, or tensors that do not fit the configuration or the base; names
      the file and the option or tensor.
  """
  folder = Path(folder)
  where = folder / CONFIG_NAME
  options = peft_config.Options.parse(
    hf_safetensors.read_json(where), model_config.num_layers, str(where)
  )
  factors = _read_factors(folder / WEIGHTS_NAME, model_config)
  names = _check_targets(factors, options, model_config.num_layers)
  options.check_patterns([module for module, _, _ in factors.values()])
  modules = {key: options.module(m) for key, (m, _, _) in factors.items()}
  for key, (module, a, _) in factors.items():
    if len(a) != modules[key].rank:
      raise ValueError(
        f'{where}: rank of {module} is {modules[key].rank}, but its tensors '
        f'have {len(a)}.'
      )
  lora_config = options.lora_config(
    tuple(name.split('/')[1] for name in names), set(modules.values())
  )

  tree: dict[str, np.ndarray] = {}
  num_layers = model_config.num_layers
  for name in names:
    rank = max(modules[i, name].rank for i in range(num_layers))
    a_shape, b_shape = factor_shapes(name, model_config, rank)
    all_a = np.zeros((num_layers, *a_shape), np.float32)
    all_b = np.zeros((num_layers, *b_shape), np.float32)
    for i in range(num_layers):
      _, a, b = factors[i, name]
      ratio = modules[i, name].scale / lora_config.scale
      if not math.isclose(ratio, 1.0, rel_tol=1e-9):
        b = b * np.float32(ratio)
      r = len(a)
      all_a[i, ..., :r] = np.moveaxis(a, 0, -1).reshape(*a_shape[:-1], r)
      all_b[i, :r] = np.moveaxis(b, -1, 0).reshape(r, *b_shape[1:])
    tree[f'layers/{name}/lora_a'] = all_a
    tree[f'layers/{name}/lora_b'] = all_b
  scanned = pytree.unflatten(tree)
  return lora_config, scanned if scan_layers else layout.unstack_layers(scanned)


def factor_shapes(
  name: str, config: ModelConfig, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Shapes of lora_a and lora_b of one layer, factorization `matrix`.

  'attn/q'    [D, r], [r, N, H]
  'attn/o'    [N, H, r], [r, D]
  """
  outputs, inputs = base.projection_axes(f'layers/{name}/w')
  sizes = layout.axis_sizes(config)
  return (
    (*(sizes[c] for c in inputs), rank),
    (rank, *(sizes[c] for c in outputs)),
  )


def write_adapter(
  folder: str | os.PathLike,
  lora: pytree.Tree,
  lora_config: LoraConfig,
  base_name: str,
  trained_base: pytree.Tree | None = None,
):
  """Writes an adapter that PEFT, and `read_adapter`, apply as we do.

  A `keras` factorization of q, k or v becomes one block of rank r for each
  head, N r in all: exact, and larger. Ranks that `read_adapter` padded with
  zeros get their true size again. The folder appears whole or not at all;
  an adapter that is there already is replaced.

  Args:
    folder: to be made, or an adapter that is replaced.
    lora: the tree of the collection `lora`, scanned or unrolled; any dtype is
      written as float32.
    lora_config: gives the scale and the factorization.
    base_name: goes into `base_model_name_or_path`.
    trained_base: base leaves that were trained with the adapter, as nested
      dicts; without them the adapter does not give the trained model.

  Raises:
    ValueError: the folder holds something else, or the tree is no adapter.
  """
  folder = files.path(folder)
  is_adapter = (folder / CONFIG_NAME).is_file()
  is_free = not folder.exists() or (
    folder.is_dir() and not any(folder.iterdir())
  )
  if not (is_adapter or is_free):
    raise ValueError(
      f'{folder}: there is something else than an adapter, expected a new or '
      'empty folder.'
    )
  lora = jax.device_get(lora)
  if 'layers' in lora:
    lora = layout.unstack_layers(lora)
  tensors, ranks = _export(dict(pytree.items(lora)), lora_config)
  raw = peft_config.to_json(ranks, lora_config, base_name)
  from safetensors.numpy import save_file

  def fill(tmp: Path):
    text = json.dumps(raw, indent=2, sort_keys=True)
    (tmp / CONFIG_NAME).write_text(text + '\n', 'utf-8')
    save_file(tensors, tmp / WEIGHTS_NAME, metadata={'format': 'pt'})
    if trained_base:
      leaves = {
        name: np.ascontiguousarray(jax.device_get(leaf), np.float32)
        for name, leaf in pytree.items(trained_base)
      }
      save_file(leaves, tmp / TRAINED_BASE_NAME)
      (tmp / 'README.md').write_text(_TRAINED_BASE_NOTE, 'utf-8')

  atomic_folder.replace(folder, fill)


_TRAINED_BASE_NOTE = f"""\
The adapter was trained together with parameters of its base, which are in
`{TRAINED_BASE_NAME}`, by their paths in gemma_jax. Other tools do not read
that file: with the adapter alone they do not compute the trained model.
"""


def read_trained_base(folder: str | os.PathLike) -> pytree.Tree:
  """Base leaves trained along with an adapter, float32; {} if there are none.

  They have the form (scanned or unrolled) in which they were trained.
  """
  path = Path(folder) / TRAINED_BASE_NAME
  if not path.is_file():
    return {}
  entries = safetensors_file.read_header(path)
  return pytree.unflatten({n: e.read_all() for n, e in entries.items()})


def _read_factors(
  path: Path, config: ModelConfig
) -> dict[tuple[int, str], Factors]:
  """The factors of each (layer, projection) in the file, in float32."""
  if not path.is_file():
    raise ValueError(
      f'{path}: there is no such file; an adapter of older form (.bin) has to '
      'be saved again as safetensors.'
    )
  found: dict[tuple[int, str], dict[str, np.ndarray]] = {}
  modules = {}
  shapes = base.stored_shapes(config)
  for tensor, entry in safetensors_file.read_header(path).items():
    match = _TENSOR.fullmatch(tensor)
    if not match or match['name'] not in _PATHS:
      raise ValueError(
        f'{path}: tensor {tensor} is unexpected, expected lora_A and lora_B '
        f'of {", ".join(_PATHS)}.'
      )
    name, layer = _PATHS[match['name']], int(match['layer'])
    if layer >= config.num_layers:
      raise ValueError(
        f'{path}: tensor {tensor} is for layer {layer}, but the base has '
        f'{config.num_layers}; the adapter belongs to another base.'
      )
    factor = match['factor']
    outputs, inputs = shapes[f'layer_{layer}/{name}/w']
    rank = entry.shape[0 if factor == 'A' else -1] if entry.shape else 0
    expected = (rank, inputs) if factor == 'A' else (outputs, rank)
    if rank < 1 or entry.shape != expected:
      wanted = f'[r, {inputs}]' if factor == 'A' else f'[{outputs}, r]'
      raise ValueError(
        f'{path}: tensor {tensor} has shape {list(entry.shape)}, expected '
        f'{wanted}; the adapter belongs to another base.'
      )
    modules[layer, name] = match['module']
    pair = found.setdefault((layer, name), {})
    if factor in pair:
      raise ValueError(f'{path}: tensor {tensor} is there under two names.')
    pair[factor] = entry.read_all().astype(np.float32)
  factors = {}
  for key, pair in found.items():
    if pair.keys() != {'A', 'B'} or len(pair['A']) != pair['B'].shape[1]:
      raise ValueError(
        f'{path}: {modules[key]} needs lora_A and lora_B of one rank, got '
        f'{ {f: list(x.shape) for f, x in sorted(pair.items())} }.'
      )
    factors[key] = (modules[key], pair['A'], pair['B'])
  if not factors:
    raise ValueError(f'{path}: there is no tensor in it.')
  return factors


def _check_targets(
  factors: dict[tuple[int, str], Factors],
  options: peft_config.Options,
  num_layers: int,
) -> list[str]:
  """The projections that carry factors; the options must select just these.

  Raises:
    ValueError: a module is selected but has no tensors or the other way round,
      or a projection is adapted in some layers only.
  """
  names = [
    name
    for name in layout.PROJECTION_EQUATIONS
    if any((i, name) in factors for i in range(num_layers))
  ]
  any_module = next(iter(factors.values()))[0]
  prefix = any_module.split('layers.')[0]
  for i in range(num_layers):
    for name in layout.PROJECTION_EQUATIONS:
      module = f'{prefix}layers.{i}.{hf_safetensors.MODULES[name]}'
      present, selected = (i, name) in factors, options.selects(module)
      if present != selected:
        raise ValueError(
          f'{options.where}: target_modules '
          f'{"selects" if selected else "leaves out"} {module}, but '
          f'{WEIGHTS_NAME} has {"factors" if present else "none"} for it.'
        )
      if not present and name in names:
        raise ValueError(
          f'{options.where}: there is an adapter on {name} in some layers '
          f'but not in layer {i}, expected all {num_layers} layers.'
        )
  return names


def _export(
  leaves: dict[str, np.ndarray], lora_config: LoraConfig
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
  """PEFT's tensors, and the ranks that `peft_config.to_json` takes."""
  tensors = {}
  ranks: dict[str, dict[str, int]] = {}  # of each module, by projection
  for path in leaves:
    match = _LEAF.fullmatch(path)
    if not match or match[2] not in hf_safetensors.MODULES:
      raise ValueError(f'adapter: leaf {path} is no lora_a or lora_b.')
    layer, name, _ = match.groups()
    stem = f'layer_{layer}/{name}'
    if not {f'{stem}/lora_a', f'{stem}/lora_b'} <= leaves.keys():
      raise ValueError(f'adapter: {stem} needs both lora_a and lora_b.')
  for path, a in leaves.items():
    if not path.endswith('lora_a'):
      continue
    layer, name, _ = _LEAF.fullmatch(path).groups()
    a, b = matrices(name, a, leaves[f'{path[:-1]}b'], lora_config)
    # Ranks that differ between layers were padded with zeros in both factors.
    used = np.flatnonzero(a.any(axis=1) | b.any(axis=0))
    rank = int(used[-1]) + 1 if used.size else len(a)
    a, b = a[:rank], b[:, :rank]
    module = f'model.layers.{layer}.{hf_safetensors.MODULES[name]}'
    ranks.setdefault(module.rpartition('.')[2], {})[module] = rank
    for key, x in (('lora_A', a), ('lora_B', b)):
      tensor = f'base_model.model.{module}.{key}.weight'
      tensors[tensor] = np.ascontiguousarray(x, np.float32)
  if not tensors:
    raise ValueError('adapter: the tree has no factors, nothing to write.')
  patterns: dict[str, int] = {}
  for projection, by_module in ranks.items():
    common = set(by_module.values())
    patterns |= {projection: common.pop()} if len(common) == 1 else by_module
  return tensors, patterns


def matrices(
  name: str, a: np.ndarray, b: np.ndarray, lora_config: LoraConfig
) -> tuple[np.ndarray, np.ndarray]:
  """One layer's factors as PEFT has them: A [r, inputs], B [outputs, r].

  Args:
    name: the projection, e.g. 'attn/q'.
    a: lora_a of one layer, in the factorization of `lora_config`.
    b: lora_b of that layer.
    lora_config: tells the factorization; of `keras`, r is N times its rank.
  """
  if lora_config.factorization == 'keras' and name in _PER_HEAD:
    return _keras_matrices(a, b)
  rank = a.shape[-1]
  return a.reshape(-1, rank).T, b.reshape(rank, -1).T


def as_matrix(
  factors: pytree.Tree, lora_config: LoraConfig, model_config: ModelConfig
) -> pytree.Tree:
  """The same adapter in the factorization `matrix`, of the same scale.

  `keras` factors of q, k and v take rank N r (K r); others stay as they are.

  Args:
    factors: scanned tree in the factorization of `lora_config`.
    lora_config: tells the factorization.
    model_config: the base's architecture.
  """
  leaves = dict(pytree.items(jax.device_get(factors)))
  for path in [path for path in leaves if path.endswith('/lora_a')]:
    module = path.removesuffix('/lora_a')
    name = module.removeprefix('layers/')
    pairs = [
      matrices(name, a, b, lora_config)
      for a, b in zip(leaves[path], leaves[f'{module}/lora_b'], strict=True)
    ]
    a_shape, b_shape = factor_shapes(name, model_config, len(pairs[0][0]))
    leaves[path] = np.stack([a.T.reshape(a_shape) for a, _ in pairs])
    leaves[f'{module}/lora_b'] = np.stack(
      [b.T.reshape(b_shape) for _, b in pairs]
    )
  return pytree.unflatten(leaves)


# Projections whose outputs have a heads axis: the factorizations differ there.
_PER_HEAD = ('attn/q', 'attn/k', 'attn/v')


def _keras_matrices(
  a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Keras's factors as matrices with the same product.

      A [N, D, r], B [r, H] → [N r, D], [N H, N r]

  Head n's update A[n] B needs r rows of its own; B stands N times on the
  diagonal.
  """
  num_heads, embed_dim, rank = a.shape
  head_dim = b.shape[1]
  rows = a.transpose(0, 2, 1).reshape(num_heads * rank, embed_dim)
  blocks = np.zeros((num_heads, head_dim, num_heads, rank), b.dtype)
  for n in range(num_heads):
    blocks[n, :, n] = b.T
  return rows, blocks.reshape(num_heads * head_dim, num_heads * rank)
