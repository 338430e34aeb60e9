"""What a run compiles: its steps, from shapes alone.

It needs neither weights nor records, so it can be compiled for devices that are
not here. A program is for one adapter, or for K with a leading axis K
(`training.batched`); both have the signatures of `training.step`.
"""

from collections.abc import Callable
import dataclasses
import functools
import time
from typing import Any

from absl import logging
import jax
from jax.sharding import Mesh

from gemma_jax import pytree
from gemma_jax.config.lora import LoraConfig
from gemma_jax.model.transformer import Transformer
from gemma_jax.training import batched, compiler, sharding
from gemma_jax.training import state as state_lib
from gemma_jax.training import step as step_lib
from gemma_jax.training.model import Model
from gemma_jax.training.step import Hyperparameters


@dataclasses.dataclass(frozen=True)
class Program:
  """The steps of one adapter, or of several, and what they take.

  Attributes:
    model: the transformer and its tokens, with the adapter's dropout.
    mesh: the devices.
    variables: {'params', 'lora'} of one adapter, `jax.ShapeDtypeStruct`s.
    trainable: regexes over their paths; leaves that none matches are frozen.
    loss_fn: as in `training.step`.
    make_optimizer: as in `training.step`.
    members: K; None: one adapter, without a leading axis.
    accumulate_steps: parts of a batch.
    seed: for dropout.
    remat: a policy of `Transformer.remat`, or auto.
    split_lora: splits the adapter over the mesh as the base is split; None
      replicates it.
  """

  model: Model
  mesh: Mesh
  variables: Any
  trainable: tuple[str, ...]
  loss_fn: step_lib.LossFn
  make_optimizer: step_lib.MakeOptimizer
  members: int | None = None
  accumulate_steps: int = 1
  seed: int = 0
  remat: str = 'auto'
  split_lora: LoraConfig | None = None

  @functools.cached_property
  def abstract(self) -> tuple[state_lib.TrainState, Any]:
    """(state, frozen) as `jax.ShapeDtypeStruct`s with their shardings.

    Raises:
      ValueError: trainable leaves or a mesh that do not fit the base.
    """
    trainable, frozen = state_lib.split(self.variables, self.trainable)
    state = jax.eval_shape(self._init_state, self._in_members(trainable))
    return self._placed(state), self._placed(frozen)

  @property
  def hyperparameters(self) -> Hyperparameters:
    """Abstract hyperparameters, as the steps are compiled for."""
    shape = () if self.members is None else (self.members,)
    everywhere = sharding.replicated(self.mesh)
    array = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)
    if self.members is None:
      return Hyperparameters(array('float32'))
    return Hyperparameters(array('float32'), array('float32'), array('uint32'))

  def abstract_batch(self, batch: Any) -> Any:
    """Shapes and dtypes of a batch, its rows split over the mesh."""
    placed = sharding.batch_sharding(self.mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), batch)

  def init_state(self, trainable: Any) -> state_lib.TrainState:
    """The state before the first update; donates the leaves."""
    placed = jax.tree.map(lambda x: x.sharding, self.abstract[0])
    return jax.jit(self._init_state, out_shardings=placed, donate_argnums=0)(trainable)

  def compile_train_step(self, batch: Any) -> jax.stages.Compiled:
    """step(state, hyperparameters, frozen, batch) -> (state, metrics).

    The state is donated.

    Args:
      batch: abstract, from `abstract_batch`.
    """
    return compiler.with_remat(
      self.model.transformer,
      self.remat,
      self.mesh,
      lambda transformer: self._compile_train_step(transformer, batch),
    )

  def compile_eval_step(self, batch: Any) -> jax.stages.Compiled:
    """eval_step(trainable, hyperparameters, frozen, batch) -> losses.

    Args:
      batch: abstract, from `abstract_batch`.
    """
    step = step_lib.make_eval_step(self.model, self.loss_fn)
    if self.members is not None:
      step = batched.map_eval_step(step, self._mapped_at_once(batch, 1))
    state, frozen = self.abstract
    return self._compile(
      'evaluation step',
      step,
      sharding.replicated(self.mesh),
      (),
      (state.trainable, self.hyperparameters, frozen, batch),
    )

  def _compile_train_step(self, transformer: Transformer, batch: Any) -> jax.stages.Compiled:
    step = step_lib.make_train_step(
      dataclasses.replace(self.model, transformer=transformer),
      self.loss_fn,
      self.make_optimizer,
      accumulate_steps=self.accumulate_steps,
      seed=self.seed,
    )
    if self.members is not None:
      step = batched.map_train_step(step, self._mapped_at_once(batch, self.accumulate_steps))
    state, frozen = self.abstract
    placed = jax.tree.map(lambda x: x.sharding, state)
    return self._compile(
      'training step',
      step,
      (placed, sharding.replicated(self.mesh)),
      0,
      (state, self.hyperparameters, frozen, batch),
    )

  def _compile(
    self,
    name: str,
    step: Callable[..., Any],
    placed: Any,
    donated: int | tuple[int, ...],
    arguments: tuple[Any, ...],
  ) -> jax.stages.Compiled:
    """Compiles a step for abstract arguments and logs how long it took."""
    started = time.perf_counter()
    options = compiler.options(self.mesh.devices.flat[0].platform)
    jitted = jax.jit(step, donate_argnums=donated, out_shardings=placed, compiler_options=options)
    compiled = jitted.lower(*arguments).compile()
    several = '' if self.members is None else f' of {self.members} adapters'
    logging.info('Compiled the %s%s in %.1f s', name, several, time.perf_counter() - started)
    return compiled

  def _mapped_at_once(self, batch: Any, parts: int) -> int:
    assert self.members is not None  # one adapter is not mapped
    positions = max(x.size for _, x in pytree.items(batch)) // parts
    platform = self.mesh.devices.flat[0].platform
    return batched.mapped_at_once(self.members, positions, platform)

  def _init_state(self, trainable: Any) -> state_lib.TrainState:
    tx, _ = self.make_optimizer(None)
    init = state_lib.init_state if self.members is None else batched.init_state
    return init(trainable, tx)

  def _in_members(self, trainable: Any) -> Any:
    if self.members is None:
      return trainable
    lead = lambda x: jax.ShapeDtypeStruct((self.members, *x.shape), x.dtype)
    return jax.tree.map(lead, trainable)

  def _placed(self, tree: Any) -> Any:
    placed = sharding.tree_shardings(
      tree, self.model.transformer.config, self.mesh, self.split_lora
    )
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, placed
    )
