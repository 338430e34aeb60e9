"""Writes a base as a Flax release (`flax_release`), one array at a time."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma_jax import pytree
from gemma_jax.formats import base_source, flax_release, hf_writer
from gemma_jax.formats.base_source import BaseSource
from gemma_jax.formats.flax_release import Place
from gemma_jax.model.config import ModelConfig

# Arrays are stored in blocks of at most this size, so that a reader need not
# hold the embedding twice.
_BLOCK_BYTES = 64 << 20
# Orbax holds a data file in memory until it is this large.
_DATA_FILE_BYTES = 256 << 20


def write_folder(folder: Path, source: BaseSource, dtype: Any = 'auto', nested: bool = False):
  """Fills an empty folder with `params/` (Orbax) and tokenizer.model.

  One array at a time is in memory. An embedding of 256000 rows gets the 128 rows
  of zeros that the release has and its readers expect.

  Args:
    folder: exists and is empty; `atomic_folder.replace` makes it appear whole.
    source: any base, also a merged one.
    dtype: 'auto' (the base's own), 'float32' or 'bfloat16'.
    nested: store names as nested dicts rather than flat.

  Raises:
    ValueError: the dtype is not one of these.
  """
  dtype = base_source.weight_dtype(source, dtype)
  config = source.config
  places = flax_release.make_places(
    exported_config(config),
    fused=config.num_heads == config.num_kv_heads,
    swapped=flax_release.gating_is_swapped(config),
  )
  parts: dict[str, dict[str, Place]] = {}
  for path, place in places.items():
    parts.setdefault(place.name, {})[path] = place
  with futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    leaves = {
      f'transformer/{name}': _Leaf(
        own[next(iter(own))].shape, np.dtype(dtype), functools.partial(_fill, source, own, pool)
      )
      for name, own in parts.items()
    }
    _save(folder.absolute() / flax_release.FOLDER_NAME, leaves, nested)
  tokenizer = source.tokenizer()
  if tokenizer is not None and tokenizer.model_proto is not None:
    (folder / 'tokenizer.model').write_bytes(tokenizer.model_proto)


@dataclasses.dataclass(frozen=True)
class _Leaf:
  """An array that is read when its turn comes.

  Attributes:
    shape: of the whole array.
    dtype: as written.
    fill: puts the values into an array of zeros.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  fill: Callable[[np.ndarray], None]

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  def load(self) -> np.ndarray:
    array = np.zeros(self.shape, self.dtype)
    self.fill(array)
    return array


def _fill(
  source: BaseSource, places: Mapping[str, Place], pool: futures.Executor, array: np.ndarray
) -> None:
  """Reads the leaves in one array of the release, by path in our tree."""
  for path, place in places.items():
    leaf = place.view(array if place.index is None else array[place.index])
    if path == 'embedder/input_embedding':
      leaf = leaf[: source.config.vocab_size]
    source.read_into(path, leaf, pool)


def _save(folder: Path, leaves: Mapping[str, _Leaf], nested: bool) -> None:
  """Writes 'transformer/module/name' → leaf with Orbax, one leaf at a time."""
  import orbax.checkpoint as ocp

  class InTurn(ocp.type_handlers.NumpyHandler):
    """Starts the next array when one is written.

    Orbax would start all at once and hold everything not yet written.
    """

    async def serialize(self, values: Sequence[Any], infos, args=None):
      args = args or [ocp.SaveArgs()] * len(values)
      for value, info, arg in zip(values, infos, args, strict=True):
        started = await super().serialize([value.load()], [info], [arg])
        for future in started:
          await asyncio.to_thread(future.result)
      return []

  if nested:
    tree = pytree.unflatten(leaves)
  else:
    tree = {}
    for name, leaf in leaves.items():
      module, _, last = name.rpartition('/')
      tree.setdefault(module, {})[last] = leaf
  registry = ocp.type_handlers.create_type_handler_registry(
    (_Leaf, InTurn(deepcopy_host_arrays=False)), (jax.Array, ocp.type_handlers.ArrayHandler())
  )
  handler = ocp.PyTreeCheckpointHandler(
    use_compression=False,  # trained weights hardly compress
    type_handler_registry=registry,
  )
  save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_BLOCK_BYTES), tree)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(
      folder,
      args=ocp.args.PyTreeSave(
        tree, save_args=save_args, ocdbt_target_data_file_size=_DATA_FILE_BYTES
      ),
    )


def exported_config(config: ModelConfig) -> ModelConfig:
  """The architecture with the number of rows of the release's embedding."""
  padded = {tokens: rows for rows, tokens in hf_writer.TOKEN_ROWS.items()}
  rows = padded.get(config.vocab_size, config.vocab_size)
  return dataclasses.replace(config, vocab_size=rows)
