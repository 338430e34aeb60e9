"""From a `TrainConfig` to the objects that a run is made of.

`prepare` opens the base (its header), reads and tokenizes the records, plans
the rows, and defines what is compiled. Training, dry run, sweeps and tests start
from the same `Run`, so they cannot differ. A program needs no records, only
shapes: an `Outline` makes one too.
"""

from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import time
from typing import Any, NamedTuple

from absl import logging
import jax
import numpy as np

from gemma_jax import pytree
from gemma_jax.config.train import OptimizerConfig, TrainConfig
from gemma_jax.data import dataset as dataset_lib
from gemma_jax.data import examples, row_plan
from gemma_jax.data.dataset import Dataset
from gemma_jax.formats import adapter
from gemma_jax.formats.trained_with import TrainedWith
from gemma_jax.lora.lora import Lora
from gemma_jax.runs import batched, hosts, summary
from gemma_jax.runs.base import Base
from gemma_jax.runs.program import Program
from gemma_jax.training import optimizer, sharding
from gemma_jax.training import state as state_lib
from gemma_jax.training import step as step_lib
from gemma_jax.training.step import Hyperparameters


@dataclasses.dataclass(frozen=True)
class Run:
  """A prepared run, of one adapter or of several.

  Attributes:
    given: the resolved config that `prepare` was given, with the row length set.
    config: the same, with the settings of the adapter at `lora.path`; for
      several adapters, the config with the largest rank.
    members: the configs of several adapters, else None.
    base: not yet loaded.
    start: the adapter at `lora.path`, or None.
    data: the records as tokens.
    plan: the rows of every step.
    steps: updates in the run.
    program: what is compiled.
  """

  given: TrainConfig
  config: TrainConfig
  members: tuple[TrainConfig, ...] | None
  base: Base
  start: Lora | None
  data: Dataset
  plan: row_plan.RowPlan
  steps: int
  program: Program

  @property
  def configs(self) -> tuple[TrainConfig, ...]:
    """The config of every adapter."""
    return self.members or (self.config,)

  @property
  def hyperparameters(self) -> Hyperparameters:
    """The step's hyperparameters; [], or [K] for several adapters."""
    return hyperparameters(self.config, self.members)

  def check(self) -> None:
    """ValueError if the trainable leaves or the mesh do not fit the base."""
    _ = self.program.abstract

  def summary(self) -> summary.Summary:
    """The parameter table."""
    return summary.of_state(*self.program.abstract)

  def init_lora(self, base: Base) -> Lora:
    """The adapter, or the stack of several, before the first update.

    Args:
      base: loaded if the adapter is DoRA, which starts from its weights.
    """
    if self.start is not None:
      return dataclasses.replace(self.start, reference=base.reference, trained_with=self._with())
    loras = [Lora.init(base, config.lora, seed=config.seed) for config in self.configs]
    lora = loras[0] if self.members is None else Lora.stack(loras)
    return dataclasses.replace(lora, trained_with=self._with())

  def place(self, base: Base, lora: Lora) -> tuple[Any, Any]:
    """(trainable, frozen) on the mesh, before the first update.

    Args:
      base: loaded.
      lora: as `init_lora` made it.
    """
    state, frozen = self.program.abstract
    placed = jax.tree.map(lambda x: x.sharding, state_lib.join(state.trainable, frozen))
    factors = sharding.put(hosts.to_numpy(lora.factors), placed['lora'])
    return state_lib.split({'params': base.params, 'lora': factors}, self.config.trainable)

  def abstract_batch(self, length: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """A global batch [B, length], by default [B, T]; rows split over the mesh."""
    return abstract_batch(self.program, self.config, length)

  def record_ids(self, step: int) -> list[int]:
    """The training records in the batch of step 0, 1, 2, ..."""
    rows = self.plan.rows(step)
    return [int(self.data.train.record_ids[i]) for row in rows for i in row]

  def fingerprints(self) -> dict[str, str]:
    """What must be unchanged on resuming, besides the config."""
    tokenizer = self.base.tokenizer
    start = hashlib.sha256()
    if self.start is not None:
      # The adapter's own settings: its path may change, its scale may not.
      settings = dataclasses.replace(self.config.lora, path='', dropout=0.0)
      start.update(repr(settings).encode())
      for name, array in pytree.items(self.start.factors):
        start.update(name.encode())
        start.update(np.ascontiguousarray(array).tobytes())
    return {
      'adapter': start.hexdigest(),
      'base': self.base.source.fingerprint(),
      'tokenizer': '' if tokenizer is None else tokenizer.fingerprint(),
      'data': self.data.fingerprint(),
    }

  def _with(self) -> TrainedWith:
    return TrainedWith.of(self.config.data)


class Outline(NamedTuple):
  """A run before its records are read.

  Attributes:
    given: as in `Run`.
    config: as in `Run`.
    base: as in `Run`.
    start: as in `Run`.
  """

  given: TrainConfig
  config: TrainConfig
  base: Base
  start: Lora | None

  def program(self, steps: int, members: int | None = None) -> Program:
    """What is compiled.

    Args:
      steps: updates in the run, for the schedule.
      members: K adapters with a leading axis; None: one without.
    """
    return make_program(self.config, self.base, steps, members)


def prepare(config: TrainConfig) -> Run:
  """Opens, reads and checks everything but the weights.

  Args:
    config: resolved, by `TrainConfig.resolve`.

  Raises:
    ValueError: the first thing that does not fit, with its remedy.
  """
  return _prepare(config, None)


def prepare_several(configs: Sequence[TrainConfig]) -> Run:
  """The same for several adapters trained at once (`batched`).

  Raises:
    ValueError: as `prepare`, or the configs cannot be trained at once.
  """
  batched.check(configs)
  return _prepare(max(configs, key=lambda config: config.lora.rank), tuple(configs))


def with_members(run: Run, configs: Sequence[TrainConfig]) -> Run:
  """A prepared run with the same base and records, for other adapters at once."""
  batched.check(configs)
  largest = max(configs, key=lambda config: config.lora.rank)
  config = dataclasses.replace(largest, data=run.config.data).resolve()
  return dataclasses.replace(
    run,
    config=config,
    members=tuple(configs),
    program=make_program(config, run.base, run.steps, len(configs)),
  )


def outline(config: TrainConfig, devices: Sequence[Any] | None = None) -> Outline:
  """Opens the base and checks it against the mesh; reads no records.

  Args:
    config: resolved.
    devices: by default all that JAX sees.

  Raises:
    ValueError: the first thing that does not fit, with its remedy.
  """
  base = Base.open(config.model, config.mesh, devices)
  sharding.check_batch(
    base.mesh,
    config.data.global_batch_size // config.optimizer.accumulate_steps,
    'data.global_batch_size / optimizer.accumulate_steps',
  )
  seq_len = dataset_lib.row_length(config.data.seq_len, base)
  given = config
  if seq_len != config.data.seq_len:
    data = dataclasses.replace(config.data, seq_len=seq_len)
    given = dataclasses.replace(config, data=data).resolve()
  config, start = adapter.start_from(given, base.source)
  return Outline(given, config, base, start)


def make_program(
  config: TrainConfig, base: Base, steps: int, members: int | None = None
) -> Program:
  """What is compiled for a config; arguments as in `Outline.program`."""
  model = dataclasses.replace(
    base.model, transformer=base.transformer.clone(dropout=config.lora.dropout)
  )
  return Program(
    model=model,
    mesh=base.mesh,
    variables=state_lib.abstract_variables(base.config, config.lora, base.dtype, base.scan_layers),
    trainable=tuple(config.trainable),
    loss_fn=step_lib.token_loss,
    make_optimizer=make_optimizer(config.optimizer, steps, config.trainable),
    members=members,
    accumulate_steps=config.optimizer.accumulate_steps,
    seed=config.seed,
    remat=config.model.remat,
    split_lora=config.lora if config.mesh.shard_adapter else None,
  )


def make_optimizer(
  config: OptimizerConfig, steps: int, trainable: Sequence[str]
) -> Callable[..., Any]:
  """The `training.step.MakeOptimizer` for a config."""

  def make(learning_rate=None):
    own = config
    if learning_rate is not None:
      own = dataclasses.replace(config, learning_rate=learning_rate)
    return optimizer.make_optimizer(own, steps, trainable), optimizer.make_schedule(own, steps)

  return make


def hyperparameters(
  config: TrainConfig, members: Sequence[TrainConfig] | None = None
) -> Hyperparameters:
  """The step's hyperparameters for one adapter, or [K] for several."""
  if members is None:
    return Hyperparameters(np.float32(config.lora.scale))
  column = lambda values, dtype: np.asarray(list(values), dtype)
  return Hyperparameters(
    scale=column((c.lora.scale for c in members), np.float32),
    learning_rate=column((c.optimizer.learning_rate for c in members), np.float32),
    seed=column((c.seed for c in members), np.uint32),
  )


def abstract_batch(
  program: Program, config: TrainConfig, length: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
  """A global batch [B, length], by default [B, T]; rows split over the mesh."""
  row = examples.empty_row(length or config.data.seq_len)
  rows = config.data.global_batch_size
  return program.abstract_batch(
    {name: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype) for name, x in row.items()}
  )


def _prepare(config: TrainConfig, members: tuple[TrainConfig, ...] | None) -> Run:
  made = outline(config)
  started = time.perf_counter()
  data = Dataset(made.given.data, made.base)
  plan = data.plan(config.seed)
  logging.info('Read the records in %.1f s', time.perf_counter() - started)
  steps = config.steps or plan.steps_for_epochs(config.epochs)
  return Run(
    given=made.given,
    config=made.config,
    members=members,
    base=made.base,
    start=made.start,
    data=data,
    plan=plan,
    steps=steps,
    program=made.program(steps, None if members is None else len(members)),
  )
