"""An adapter as one object: its factors, their configuration and their scale.

    lora = Lora.init(base, rank=8, targets='all')
    model.apply(lora.variables(base.params), tokens)

A `Lora` is a pytree: its arrays are the factors, the scale and any trained
leaves of the base; the rest is static. The model only gets the result of
`variables`, so no caller can forget the scale.

`Lora.stack` turns K adapters into one object, whose arrays have a leading axis
K; `members` takes it apart again.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from gemma_jax import pytree
from gemma_jax.config import checks
from gemma_jax.config.lora import LoraConfig
from gemma_jax.lora import align
from gemma_jax.lora import factors as factors_lib
from gemma_jax.model.config import ModelConfig

# Of the random streams of one seed, the one that A is drawn from.
INIT_STREAM = 0


@runtime_checkable
class Base(Protocol):
  """What an adapter has to know about its base.

  Attributes:
    reference: what it was opened by.
    config: the architecture.
    params: the weights, or None where they are not loaded.
    scan_layers: whether the leaves of all layers are stacked.
  """

  @property
  def reference(self) -> str: ...

  @property
  def config(self) -> ModelConfig: ...

  @property
  def params(self) -> Any: ...

  @property
  def scan_layers(self) -> bool: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora:
  """An adapter, or K of them with a leading axis K in every array.

  Attributes:
    factors: `<layer>/<projection>/lora_a`, `lora_b` and, with DoRA,
      `lora_magnitude`, float32; {} changes nothing.
    scale: the factor on B A, float32 [] or [K].
    config: its configuration; for K adapters, a tuple of K.
    trained_base: leaves that replace the base's, usually {}.
    reference: the base it was made for, '' if unknown.
    trained_with: how its records were rendered (`formats.TrainedWith`), None
      if unknown.
  """

  factors: pytree.Tree = dataclasses.field(repr=False)
  scale: Any
  config: Any = dataclasses.field(metadata={'static': True})
  trained_base: pytree.Tree = dataclasses.field(default_factory=dict, repr=False)
  reference: str = dataclasses.field(default='', metadata={'static': True})
  trained_with: Any = dataclasses.field(default=None, metadata={'static': True})

  @classmethod
  def init(
    cls, base: Base, config: LoraConfig | None = None, *, seed: int = 0, **fields: Any
  ) -> 'Lora':
    """An adapter before its first update: it changes nothing.

        Lora.init(base, rank=8, targets='all', scale_rule='alpha_over_sqrt_r')

    Args:
      base: DoRA takes its magnitudes from the weights; others need none.
      config: by default `LoraConfig()`.
      seed: from which A is drawn.
      **fields: fields of `LoraConfig` that override the config's.

    Raises:
      ValueError: a field that does not fit the base, or DoRA without weights.
    """
    checks.instance('base', base, Base, 'a loaded base, gemma_jax.load(...)')
    checks.seed(seed)
    config = dataclasses.replace(config or LoraConfig(), **fields)
    config.check()
    config.freeze()
    if config.path:
      raise ValueError(
        f'lora.path: got {config.path!r}, expected none: this makes a new adapter. '
        'Lora.load reads one.'
      )
    if config.dora and base.params is None:
      raise ValueError('lora.dora: got a base without weights, expected a loaded one.')
    key = jax.random.fold_in(jax.random.key(seed), INIT_STREAM)
    factors = factors_lib.init(key, base.config, config, base.scan_layers)
    if config.dora:
      factors = factors_lib.with_magnitudes(factors, base.params)
    return cls(factors, np.float32(config.scale), config, reference=base.reference)

  @classmethod
  def load(cls, path: str, base: Base) -> 'Lora':
    """Reads an adapter for a base: a PEFT folder, or a .lora.h5 file from Keras.

    Raises:
      ValueError: nothing is there, it is broken, or it is for another base.
    """
    # An import upwards, since people look for this as a method of the type.
    from gemma_jax.formats import adapter

    checks.instance('base', base, Base, 'a loaded base, gemma_jax.load(...)')
    lora = adapter.read(path, base.config, base.scan_layers)
    return lora if lora.reference else dataclasses.replace(lora, reference=base.reference)

  def save(self, folder: str) -> None:
    """Writes a PEFT folder; an adapter that is already there is replaced.

    Raises:
      ValueError: several adapters; save its `members`.
      OSError: the folder cannot be written.
    """
    from gemma_jax.formats import adapter  # as in `load`

    self._check_single('save')
    adapter.write(folder, self)

  stack = staticmethod(align.stack)

  @property
  def is_single(self) -> bool:
    """Whether it is one adapter, without a leading axis."""
    return not isinstance(self.config, tuple)

  @property
  def configs(self) -> tuple[LoraConfig, ...]:
    """The configuration of every adapter."""
    return (self.config,) if self.is_single else self.config

  def shapes(self) -> pytree.Tree:
    """The factors of one adapter as `jax.ShapeDtypeStruct`s."""
    lead = 0 if self.is_single else 1
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[lead:], x.dtype), self.factors)

  def variables(self, params: pytree.Tree) -> dict[str, Any]:
    """{'params', 'lora'} as the model takes them: a base with this adapter.

    Raises:
      ValueError: an adapter of another form (scanned or not) or architecture.
    """
    self._check_single('apply')
    params = align.replace_leaves(params, self.trained_base)
    return factors_lib.variables(params, self.factors, self.scale)

  def merge(self, params: pytree.Tree) -> pytree.Tree:
    """The base with this adapter merged in; each kernel is cast once to its dtype.

    Raises:
      ValueError: an adapter of another form (scanned or not) or architecture.
    """
    self._check_single('merge')
    params = align.replace_leaves(params, self.trained_base)
    return factors_lib.merge(params, self.factors, self.scale)

  def members(self) -> list['Lora']:
    """The K adapters, each with its own targets and rank."""
    if self.is_single:
      return [self]
    return [
      dataclasses.replace(
        self,
        factors=align.cut(_own(align.member(self.factors, i), config), config.rank),
        scale=self.scale[i],
        config=config,
      )
      for i, config in enumerate(self.config)
    ]

  def _check_single(self, verb: str) -> None:
    if not self.is_single:
      raise ValueError(
        f'lora: got {len(self.config)} adapters to {verb}, expected one; see `Lora.members`.'
      )


def _own(factors: pytree.Tree, config: LoraConfig) -> pytree.Tree:
  """One adapter's factors, without the targets that `align` filled with zeros."""
  leaves = {}
  for name, x in pytree.items(factors):
    *_, target, leaf = name.split('/')
    if target in config.target_names and (config.dora or leaf != 'lora_magnitude'):
      leaves[name] = x
  return pytree.unflatten(leaves)
