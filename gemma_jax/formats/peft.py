"""LoRA adapters in PEFT's layout, read and written without loss.

    adapter_config.json         r, lora_alpha, target_modules, ...
    adapter_model.safetensors   ...layers.i.self_attn.q_proj.lora_A.weight
                                (r, inputs), .lora_B.weight (outputs, r),
                                .lora_magnitude_vector (outputs) with DoRA
    trained_base.safetensors    ours, only if base leaves were trained too
    gemma_jax.json              ours, how it was trained (`trained_with`)
    README.md                   its model card (`model_card`)

PEFT scales B A by lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora;
`rank_pattern` and `alpha_pattern` override r and lora_alpha by module.
"""

from collections.abc import Sequence
import math
import os
from pathlib import Path
import re

import jax
import numpy as np

from gemma_jax import files, pytree
from gemma_jax.config.train import LoraConfig
from gemma_jax.formats import (
  atomic_folder,
  hf_safetensors,
  model_card,
  peft_config,
  peft_factors,
  safetensors_file,
)
from gemma_jax.formats.trained_with import TrainedWith
from gemma_jax.lora import matrices
from gemma_jax.model import layout
from gemma_jax.model.config import ModelConfig

CONFIG_NAME = 'adapter_config.json'
WEIGHTS_NAME = 'adapter_model.safetensors'
TRAINED_BASE_NAME = 'trained_base.safetensors'

_LEAF = re.compile(r'layer_(\d+)/((?:attn|mlp)/\w+)/lora_(?:a|b|magnitude)')


def read_adapter(
  folder: str | os.PathLike, model_config: ModelConfig, scan_layers: bool = True
) -> tuple[LoraConfig, pytree.Tree]:
  """Reads an adapter for a base of this architecture.

  The factorization is `matrix`. Leaves of different projections may differ in
  rank (the leaf's shape gives it); ranks that differ between the layers of a
  projection are padded with zeros to the largest, and `LoraConfig.ranks` keeps
  the true ones. A projection that is adapted only in some layers is zero in the
  others: with A and B both zero it has no gradient, and stays zero. If a module's
  scale is not the adapter's common one, the ratio is multiplied into its lora_b.

  Args:
    folder: holds adapter_config.json and adapter_model.safetensors.
    model_config: the base's architecture.
    scan_layers: leaves for all layers together (`layers/...` [L, ...]) or for each.

  Returns:
    (LoraConfig, whose `scale` belongs to the factors; nested dicts of float32
    NumPy arrays, e.g. layers/attn/q/lora_a [L, D, r], lora_b [L, r, N, H] and,
    with DoRA, lora_magnitude [L, N, H]).

  Raises:
    ValueError: missing or broken files, an option of PEFT that is not
      supported, or tensors that do not fit the configuration or the base; names
      the file and the option or tensor.
  """
  folder = Path(folder)
  where = folder / CONFIG_NAME
  options = peft_config.Options.parse(hf_safetensors.read_json(where), str(where))
  factors, vision = peft_factors.read_factors(folder / WEIGHTS_NAME, model_config)
  names = _check_targets(factors, options, model_config.num_layers)
  options.check_patterns([*(each.module for each in factors.values()), *vision])
  modules = {key: options.module(x.module) for key, x in factors.items()}
  for key, each in factors.items():
    _check_module(each, modules[key], options)
  for name in names:  # layers without factors get zeros of the largest rank
    of_layers = [m for (_, other), m in modules.items() if other == name]
    widest = max(of_layers, key=lambda module: module.rank)
    for i in range(model_config.num_layers):
      modules.setdefault((i, name), widest)
  lora_config = options.lora_config(
    {f'layer_{i}/{name}': modules[i, name] for i, name in sorted(modules)}
  )

  tree: dict[str, np.ndarray] = {}
  for name in names:
    tree |= _leaves(name, factors, modules, lora_config, model_config)
  scanned = pytree.unflatten(tree)
  return lora_config, scanned if scan_layers else layout.unstack_layers(scanned)


def _leaves(
  name: str,
  factors: dict[tuple[int, str], peft_factors.Factors],
  modules: dict[tuple[int, str], peft_config.Module],
  lora_config: LoraConfig,
  model_config: ModelConfig,
) -> dict[str, np.ndarray]:
  """A projection's leaves by path, e.g. layers/attn/q/lora_a [L, D, r].

  Zero beyond a module's rank and in layers without one.
  """
  layers = range(model_config.num_layers)
  rank = max(modules[i, name].rank for i in layers)
  a_shape, b_shape = matrices.factor_shapes(name, model_config, rank)
  all_a = np.zeros((len(layers), *a_shape), np.float32)
  all_b = np.zeros((len(layers), *b_shape), np.float32)
  magnitudes = np.zeros((len(layers), *b_shape[1:]), np.float32)
  for i in layers:
    if (i, name) not in factors:
      continue
    _, a, b, magnitude = factors[i, name]
    ratio = modules[i, name].scale / lora_config.scale
    if not math.isclose(ratio, 1.0, rel_tol=1e-9):
      b = b * np.float32(ratio)
    r = len(a)
    all_a[i, ..., :r] = np.moveaxis(a, 0, -1).reshape(*a_shape[:-1], r)
    all_b[i, :r] = np.moveaxis(b, -1, 0).reshape(r, *b_shape[1:])
    if magnitude is not None:
      magnitudes[i] = magnitude.reshape(b_shape[1:])
  leaves = {'lora_a': all_a, 'lora_b': all_b}
  if lora_config.dora:
    leaves['lora_magnitude'] = magnitudes
  return {f'layers/{name}/{leaf}': x for leaf, x in leaves.items()}


def write_adapter(
  folder: str | os.PathLike,
  lora: pytree.Tree,
  lora_config: LoraConfig,
  base_name: str,
  trained_base: pytree.Tree | None = None,
  trained_with: TrainedWith | None = None,
  results: Sequence[str] = (),
):
  """Writes an adapter that PEFT, and `read_adapter`, apply as we do.

  A `keras` factorization of q, k or v becomes one block of rank r for each head,
  N r in all: exact, but larger. Ranks that are padded with zeros get their true
  size back (`LoraConfig.ranks`); a projection that is all zero in only some layers
  is left out there. The folder appears whole or not at all; an existing adapter is
  replaced.

  Args:
    folder: to be made, or an adapter to be replaced.
    lora: the tree of the collection `lora`, scanned or unrolled; any dtype is
      written as float32.
    lora_config: gives the scale and the factorization.
    base_name: goes into `base_model_name_or_path`.
    trained_base: base leaves that were trained with the adapter, as nested
      dicts; without them the adapter does not give the trained model.
    trained_with: how its records were rendered; None if that is not known.
    results: sentences about data and losses, for its model card.

  Raises:
    ValueError: the folder holds something else, or the tree is not an adapter.
  """
  folder = files.path(folder)
  is_adapter = (folder / CONFIG_NAME).is_file()
  is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
  if not (is_adapter or is_free):
    raise ValueError(
      f'{folder}: holds something other than an adapter, expected a new or empty folder.'
    )
  lora = jax.device_get(lora)
  if 'layers' in lora:
    lora = layout.unstack_layers(lora)
  tensors, ranks, targets = _export(dict(pytree.items(lora)), lora_config)
  raw = peft_config.to_json(ranks, targets, lora_config, base_name)
  from safetensors.numpy import save_file

  def fill(tmp: Path):
    text = files.to_json(raw, CONFIG_NAME, indent=2, sort_keys=True)
    (tmp / CONFIG_NAME).write_text(text + '\n', 'utf-8')
    save_file(tensors, tmp / WEIGHTS_NAME, metadata={'format': 'pt'})
    if trained_with is not None:
      trained_with.write(tmp)
    if trained_base:
      leaves = {
        name: np.ascontiguousarray(jax.device_get(leaf), np.float32)
        for name, leaf in pytree.items(trained_base)
      }
      save_file(leaves, tmp / TRAINED_BASE_NAME)
    has_base = bool(trained_base)
    model_card.write(tmp, base_name, lora_config, trained_with, results, trained_base=has_base)

  atomic_folder.replace(folder, fill)


def read_base_name(folder: str | os.PathLike) -> str:
  """The base that an adapter was made for, as its writer called it; '' if it does not say."""
  name = hf_safetensors.read_json(Path(folder) / CONFIG_NAME).get('base_model_name_or_path')
  return name if isinstance(name, str) else ''


def read_trained_base(folder: str | os.PathLike) -> pytree.Tree:
  """Base leaves trained along with an adapter, float32; {} if there are none.

  They keep the form (scanned or unrolled) in which they were trained.

  Raises:
    ValueError: the file is damaged, or holds something else; names it.
  """
  path = Path(folder) / TRAINED_BASE_NAME
  if not path.is_file():
    return {}
  entries = safetensors_file.read_header(path)
  branches = {name[: m.start()] for name in entries for m in re.finditer('/', name)}
  for name, entry in entries.items():
    if not entry.shape or name in branches:
      raise ValueError(
        f'{path}: tensor {name} has shape {list(entry.shape)}, expected a leaf of the base, with '
        'axes and with nothing below it.'
      )
  return pytree.unflatten({n: peft_factors.read_finite(e) for n, e in entries.items()})


def _check_module(
  factors: peft_factors.Factors, module: peft_config.Module, options: peft_config.Options
):
  """Raises ValueError unless a module's tensors are what the options say."""
  if len(factors.a) != module.rank:
    raise ValueError(
      f'{options.where}: rank of {factors.module} is {module.rank}, but its '
      f'tensors have {len(factors.a)}.'
    )
  if options.use_dora != (factors.magnitude is not None):
    raise ValueError(
      f'{options.where}: use_dora is {options.use_dora}, but {factors.module} '
      f'has {"no" if options.use_dora else "a"} lora_magnitude_vector.'
    )


def _check_targets(
  factors: dict[tuple[int, str], peft_factors.Factors],
  options: peft_config.Options,
  num_layers: int,
) -> list[str]:
  """The projections that carry factors; the options must select exactly these.

  Raises:
    ValueError: a module is selected but has no tensors, or vice versa.
  """
  chooser = 'target_modules'
  if options.layers_to_transform:
    chooser += ' with layers_to_transform'
  names = [
    name
    for name in layout.PROJECTION_EQUATIONS
    if any((i, name) in factors for i in range(num_layers))
  ]
  any_module = next(iter(factors.values())).module
  prefix = any_module.split('layers.')[0]
  for i in range(num_layers):
    for name in layout.PROJECTION_EQUATIONS:
      module = f'{prefix}layers.{i}.{hf_safetensors.MODULES[name]}'
      present, selected = (i, name) in factors, options.selects(module)
      if present != selected:
        raise ValueError(
          f'{options.where}: {chooser} '
          f'{"selects" if selected else "leaves out"} {module}, but '
          f'{WEIGHTS_NAME} has {"factors" if present else "none"} for it.'
        )
  return names


def _export(
  leaves: dict[str, np.ndarray], lora_config: LoraConfig
) -> tuple[dict[str, np.ndarray], dict[str, int], list[str]]:
  """PEFT's tensors; the ranks and targets that `peft_config.to_json` takes."""
  modules: dict[str, dict[str, np.ndarray]] = {}
  for path, leaf in leaves.items():
    match = _LEAF.fullmatch(path)
    if not match or match[2] not in hf_safetensors.MODULES:
      raise ValueError(f'adapter: leaf {path} does not belong to an adapter.')
    module, _, name = path.rpartition('/')
    modules.setdefault(module, {})[name] = leaf
  if not modules:
    raise ValueError('adapter: the tree has no factors, nothing to write.')
  tensors = {}
  ranks: dict[str, dict[str, int]] = {}  # of each module, by projection
  unused = _unused(modules)
  for path, parts in modules.items():
    if not {'lora_a', 'lora_b'} <= parts.keys():
      raise ValueError(f'adapter: {path} needs both lora_a and lora_b.')
    layer, name = path.removeprefix('layer_').split('/', 1)
    rank, a, b = lora_config.rank_of(path), parts['lora_a'], parts['lora_b']
    if a[..., rank:].any() or b[rank:].any():
      raise ValueError(
        f'adapter: {path} has rank {rank} but nonzero factors beyond it, expected zeros there.'
      )
    if path in unused:
      continue
    a, b = matrices.matrices(name, a[..., :rank], b[:rank], lora_config)
    module = f'model.layers.{layer}.{hf_safetensors.MODULES[name]}'
    ranks.setdefault(name, {})[module] = len(a)
    written = {'lora_A.weight': a, 'lora_B.weight': b}
    if 'lora_magnitude' in parts:
      written['lora_magnitude_vector'] = parts['lora_magnitude'].ravel()
    for key, x in written.items():
      tensor = f'base_model.model.{module}.{key}'
      tensors[tensor] = np.ascontiguousarray(x, np.float32)
  patterns: dict[str, int] = {}
  targets: list[str] = []
  for name, by_module in ranks.items():
    projection = hf_safetensors.MODULES[name].rpartition('.')[2]
    common = set(by_module.values())
    patterns |= {projection: common.pop()} if len(common) == 1 else by_module
    in_part = any(path.endswith(f'/{name}') for path in unused)
    targets += by_module if in_part else [projection]
  return tensors, patterns, targets


def _unused(modules: dict[str, dict[str, np.ndarray]]) -> set[str]:
  """Modules that are all zero, while others of their projection are not.

  They represent layers without an adapter (`read_adapter`).
  """
  used = {path for path, x in modules.items() if any(map(np.any, x.values()))}
  adapted = {path.partition('/')[2] for path in used}
  return {p for p in modules.keys() - used if p.partition('/')[2] in adapted}
