"""Reads the adapter that a path names: a PEFT folder, or Keras's .lora.h5.

Which of them it is, is decided by what is there, not by how it is called.
"""

import os

from gemma_jax import files, pytree
from gemma_jax.config.train import LoraConfig
from gemma_jax.formats import keras, peft
from gemma_jax.formats.trained_with import TrainedWith
from gemma_jax.model.config import ModelConfig


def read_adapter(
  path: str | os.PathLike, model_config: ModelConfig, scan_layers: bool = True
) -> tuple[LoraConfig, pytree.Tree, pytree.Tree]:
  """Reads an adapter for a base of this architecture.

  Args:
    path: a PEFT folder, or a file that Keras's `save_lora_weights` wrote; of
      this machine, or gs://.
    model_config: the base's architecture.
    scan_layers: leaves for all layers (`layers/...`) or for each.

  Returns:
    (LoraConfig whose scale and factorization belong to the factors; the
    factors, float32; base leaves trained along, {} for most adapters, in the
    form in which they were trained).

  Raises:
    ValueError: nothing is there, or an adapter that is broken, of another
      architecture or with an unsupported option.
  """
  path = files.fetch(path)
  if path.is_dir():
    config, factors = peft.read_adapter(path, model_config, scan_layers)
    return config, factors, peft.read_trained_base(path)
  if keras.is_hdf5(path):
    return *keras.read_lora(path, model_config, scan_layers), {}
  found = 'no HDF5 file' if path.is_file() else 'neither a file nor a folder'
  raise ValueError(
    f'adapter: got {str(path)!r}, which is {found}; expected a PEFT folder '
    '(adapter_config.json) or a .lora.h5 file of Keras.'
  )


def read_trained_with(path: str | os.PathLike) -> TrainedWith | None:
  """How an adapter was trained; None where nothing says so (PEFT, Keras).

  Raises:
    ValueError: its gemma_jax.json is broken.
  """
  path = files.fetch(path)
  return TrainedWith.read(path) if path.is_dir() else None
