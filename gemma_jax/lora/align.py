"""Adapters side by side over one base, interchangeable without a compilation.

Adapters of different rank, scale and targets become trees of one shape: scales
are folded into B, ranks padded with zero columns, missing targets filled with
zeros. The base itself is then the adapter of zeros, whose update is exactly 0.
`start_from` makes one of them the start of a run.
"""

from collections.abc import Sequence
import dataclasses
import re
from typing import Any, NamedTuple

from absl import logging
import jax.numpy as jnp
import numpy as np

from gemma_jax import pytree
from gemma_jax.config.train import TrainConfig
from gemma_jax.lora import factors as factors_lib
from gemma_jax.model import layout
from gemma_jax.model.config import ModelConfig

BASE = 'base'


class Adapter(NamedTuple):
  """An adapter ready to be applied.

  Attributes:
    name: the folder it came from, or 'base'.
    effective: factors with the scale in B (`factors.effective`), nested dicts.
    trained_base: base leaves trained along with it, {} for most.
    trained_with: how its records were rendered (`TrainedWith`), if it is known.
  """

  name: str
  effective: Any
  trained_base: Any
  trained_with: Any = None

  def variables(self, params: Any) -> dict[str, Any]:
    """{'params', 'lora'} for the model: the base with this adapter."""
    params = replace_leaves(params, self.trained_base)
    return {'params': params, 'lora': factors_lib.with_gains(self.effective, params)}


def load_adapters(
  folders: Sequence[str], config: ModelConfig, scan_layers: bool = True
) -> list[Adapter]:
  """The base, then the adapter of each path, all of one shape.

  Args:
    folders: PEFT folders, or .lora.h5 files of Keras.
    config: the base's architecture.
    scan_layers: form of the trees.

  Raises:
    ValueError: a folder that cannot be read or fits another architecture.
  """
  from gemma_jax.formats import adapter
  from gemma_jax.lora import matrices

  trees, trained, trained_with = [{}], [{}], [None]
  for folder in folders:
    lora_config, factors, trained_base = adapter.read_adapter(folder, config)
    if lora_config.factorization == 'keras':
      factors = matrices.as_matrix(factors, lora_config, config)
    if not scan_layers:
      factors = layout.unstack_layers(factors)
    trees.append(factors_lib.effective(factors, np.float32(lora_config.scale)))
    trained.append(trained_base)
    trained_with.append(adapter.read_trained_with(folder))
  names = [BASE, *folders]
  return [Adapter(*parts) for parts in zip(names, align(trees), trained, trained_with, strict=True)]


def start_from(config: TrainConfig, source: Any) -> tuple[TrainConfig, Any]:
  """The config with what the adapter at `lora.path` is, and its factors.

  Returns:
    (config, None) if there is no path.

  Raises:
    ValueError: no adapter of this base, or one with a trained base of its own.
  """
  path = config.lora.path
  if not path:
    return config, None
  from gemma_jax.formats import adapter

  lora_config, factors, trained_base = adapter.read_adapter(
    path, source.config, config.model.scan_layers
  )
  if trained_base:
    raise ValueError(
      f'lora.path: {path} was trained together with leaves of its base, '
      'expected factors alone; merge it (launch.convert) and train on that.'
    )
  lora_config = dataclasses.replace(lora_config, path=path, dropout=config.lora.dropout)
  logging.info('Starts from the adapter %s: %s', path, lora_config)
  trained_with = adapter.read_trained_with(path)
  if trained_with and trained_with.template != config.data.template:
    logging.warning(
      'data.template: got %s, but %s was trained with %s',
      config.data.template,
      path,
      trained_with.template,
    )
  return dataclasses.replace(config, lora=lora_config).resolve(), factors


def align(trees: Sequence[Any]) -> list[Any]:
  """Gives adapter trees one structure and one rank per target, by zeros.

      align([{}, {'layers': {'attn': {'q': {'lora_a': [L, D, 3], ...}}}}])

  returns for the first tree zeros of the second's shapes.

  Args:
    trees: effective factors, all scanned or all unrolled, factorization
      `matrix` (as read from PEFT folders).

  Returns:
    Trees of equal structure and shapes that compute what the given ones do.
  """
  flat = [dict(pytree.items(tree)) for tree in trees]
  shapes: dict[str, tuple[int, ...]] = {}
  for leaves in flat:
    for name, x in leaves.items():
      known = shapes.get(name, x.shape)
      shapes[name] = tuple(map(max, known, x.shape))

  def fit(x, shape):
    if x is None:
      return jnp.zeros(shape, jnp.float32)
    return jnp.pad(x, [(0, n - m) for m, n in zip(x.shape, shape, strict=True)])

  return [
    pytree.unflatten({n: fit(leaves.get(n), s) for n, s in shapes.items()}) for leaves in flat
  ]


def replace_leaves(params: Any, leaves: Any) -> Any:
  """A base with some leaves replaced, cast to the dtype of those they replace.

  Either tree may be scanned or unrolled: `layer_3/attn/v/w` goes to index 3 of
  a scanned leaf, and a scanned leaf to every layer of an unrolled base.

  Raises:
    ValueError: a leaf that the base does not have, or of another shape.
  """
  if not leaves:
    return params
  flat = dict(pytree.items(params))
  for name, leaf in pytree.items(leaves):
    for target, index, value in _destinations(name, leaf, flat):
      old = flat[target]
      shape = old.shape if index is None else old.shape[1:]
      if value.shape != shape:
        raise ValueError(
          f'trained base leaf {name}: got shape {value.shape}, expected '
          f'{shape}; it belongs to another architecture.'
        )
      value = jnp.asarray(value, old.dtype)
      flat[target] = value if index is None else old.at[index].set(value)
  return pytree.unflatten(flat)


def _destinations(name, leaf, flat):
  """Where a leaf goes: (path, index along L or None, value)."""
  if name in flat:
    return [(name, None, leaf)]
  one_layer = re.fullmatch(r'layer_(\d+)/(.*)', name)
  if one_layer:
    index, stacked = int(one_layer[1]), f'layers/{one_layer[2]}'
    if stacked in flat and index < len(flat[stacked]):
      return [(stacked, index, leaf)]
  rest = name.removeprefix('layers/')
  num_layers = sum(n.split('/', 1)[1:] == [rest] for n in flat)
  if rest != name and len(leaf) == num_layers:
    return [(f'layer_{i}/{rest}', None, x) for i, x in enumerate(leaf)]
  raise ValueError(
    f'trained base leaf {name}: got a path that this base does not have; it '
    'belongs to another architecture.'
  )
