"""Reads the adapter that a path names, writes one, or starts a run from it.

A path is a PEFT folder or Keras's .lora.h5: its content decides which, not its
name.
"""

from collections.abc import Sequence
import dataclasses
import os

from absl import logging
import numpy as np

from gemma_jax import files
from gemma_jax.config.lora import LoraConfig
from gemma_jax.config.train import TrainConfig
from gemma_jax.formats import keras, peft
from gemma_jax.formats.base_source import BaseSource
from gemma_jax.formats.trained_with import TrainedWith
from gemma_jax.lora import align, matrices
from gemma_jax.lora.lora import Lora
from gemma_jax.model import layout
from gemma_jax.model.config import ModelConfig

# The name of the base among adapters.
BASE = 'base'


def read(path: str | os.PathLike, model_config: ModelConfig, scan_layers: bool = True) -> Lora:
  """Reads an adapter for a base of this architecture.

  Args:
    path: a PEFT folder, or a file that Keras's `save_lora_weights` wrote; on
      this machine, or gs://.
    model_config: the base's architecture.
    scan_layers: leaves for all layers together (`layers/...`) or for each.

  Returns:
    The adapter, with its factors in float32 and in the factorization in which
    they are stored; leaves of the base keep the form in which they were trained.

  Raises:
    ValueError: nothing is there, or the adapter is broken, belongs to another
      architecture or has an unsupported option.
  """
  path = files.fetch(path)
  trained_base, reference, trained_with = {}, '', None
  if path.is_dir():
    config, factors = peft.read_adapter(path, model_config, scan_layers)
    trained_base = peft.read_trained_base(path)
    reference = peft.read_base_name(path)
    trained_with = TrainedWith.read(path)
  elif keras.is_hdf5(path):
    config, factors = keras.read_lora(path, model_config, scan_layers)
  else:
    kind = 'not an HDF5 file' if path.is_file() else 'neither a file nor a folder'
    raise ValueError(
      f'adapter: got {str(path)!r}, which is {kind}; expected a PEFT folder '
      '(adapter_config.json) or a .lora.h5 file of Keras.'
    )
  return Lora(factors, np.float32(config.scale), config, trained_base, reference, trained_with)


def write(folder: str | os.PathLike, lora: Lora, results: Sequence[str] = ()) -> None:
  """Writes a PEFT folder, along with everything else that is known of the adapter.

  Args:
    folder: to be made, or an adapter to be replaced.
    lora: the adapter.
    results: sentences about data and losses, for its model card.
  """
  kept = (lora.config, lora.reference, lora.trained_base, lora.trained_with)
  peft.write_adapter(folder, lora.factors, *kept, results)


def load_adapters(
  paths: Sequence[str], model_config: ModelConfig, scan_layers: bool = True
) -> dict[str, Lora]:
  """Loads the base (`BASE`), then the adapter of each path, all of one shape.

  The base is the adapter of zeros. A path that is given twice is read once.

  Raises:
    ValueError: a path cannot be read or belongs to another architecture.
  """
  names, loras = [BASE], [Lora({}, np.float32(1), LoraConfig())]
  for path in dict.fromkeys(paths):
    lora = read(path, model_config)
    factors = lora.factors
    if lora.config.factorization == 'keras':
      factors = matrices.as_matrix(factors, lora.config, model_config)
    if not scan_layers:
      factors = layout.unstack_layers(factors)
    names.append(path)
    loras.append(dataclasses.replace(lora, factors=factors))
  return dict(zip(names, align.align(loras), strict=True))


def start_from(config: TrainConfig, source: BaseSource) -> tuple[TrainConfig, Lora | None]:
  """The config with the fields of the adapter at `lora.path`, and that adapter.

  Returns:
    (config, adapter), or (config, None) if there is no path.

  Raises:
    ValueError: not an adapter of this base, or one with a trained base of its own.
  """
  path = config.lora.path
  if not path:
    return config, None
  lora = read(path, source.config, config.model.scan_layers)
  if lora.trained_base:
    raise ValueError(
      f'lora.path: {path} was trained together with leaves of its base, '
      'expected only factors; merge it (launch.convert) and train on that.'
    )
  lora_config = dataclasses.replace(lora.config, path=path, dropout=config.lora.dropout)
  logging.info('Starts from the adapter %s: %s', path, lora_config)
  if lora.trained_with and lora.trained_with.template != config.data.template:
    logging.warning(
      'data.template: got %s, but %s was trained with %s',
      config.data.template,
      path,
      lora.trained_with.template,
    )
  return dataclasses.replace(config, lora=lora_config).resolve(), lora


def read_trained_with(path: str | os.PathLike) -> TrainedWith | None:
  """How an adapter was trained; None if nothing says so (PEFT, Keras).

  Raises:
    ValueError: its gemma_jax.json is broken.
  """
  path = files.fetch(path)
  return TrainedWith.read(path) if path.is_dir() else None
