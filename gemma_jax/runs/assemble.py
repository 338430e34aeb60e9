"""Makes what a `Trainer` holds from what it is given, and checks it."""

from collections.abc import Iterable, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma_jax import pytree
from gemma_jax.config import checks
from gemma_jax.config.checks import at_least, require
from gemma_jax.config.train import BaseConfig, OptimizerConfig
from gemma_jax.data.dataset import Dataset
from gemma_jax.data.row_plan import RowPlan
from gemma_jax.formats.trained_with import TrainedWith
from gemma_jax.lora import align
from gemma_jax.lora import factors as factors_lib
from gemma_jax.lora.lora import Lora
from gemma_jax.runs import hosts, identity, saves
from gemma_jax.runs import prepare as prepare_lib
from gemma_jax.runs.base import Base
from gemma_jax.runs.program import Program
from gemma_jax.training import optimizer as optimizer_lib
from gemma_jax.training import sharding
from gemma_jax.training import state as state_lib
from gemma_jax.training import step as step_lib
from gemma_jax.training.state import TrainState
from gemma_jax.training.step import Hyperparameters


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a `Trainer` trains; see its arguments."""

  learning_rate: float | Sequence[float] | None
  batch_size: int
  loss_fn: step_lib.LossFn
  optimizer: OptimizerConfig | optax.GradientTransformation | None
  total_steps: int | None
  accumulate_steps: int
  trainable: tuple[str, ...]
  seed: int
  remat: str

  def check(self) -> None:
    """Raises a ValueError for a value that no trainer accepts."""
    at_least('batch_size', self.batch_size, 1)
    at_least('accumulate_steps', self.accumulate_steps, 1)
    checks.seed(self.seed)
    BaseConfig(remat=self.remat).check()
    require(callable(self.loss_fn), 'loss_fn', self.loss_fn, 'a function; see training.step')
    is_one = isinstance(self.optimizer, OptimizerConfig | optax.GradientTransformation | None)
    expected = 'an OptimizerConfig or an optax transformation'
    require(is_one, 'optimizer', self.optimizer, expected, 'E.g. optax.adam(1e-3).')


class Parts(NamedTuple):
  """What a `Trainer` holds when it starts; see its attributes."""

  program: Program
  hyperparameters: Hyperparameters
  lora: Lora
  state: TrainState
  frozen: Any
  data: Dataset | Iterable[Any]
  plan: RowPlan | None
  total_steps: int | None


def of_run(
  run: prepare_lib.Run,
  base: Base | None = None,
  lora: Lora | None = None,
  state: TrainState | None = None,
) -> Parts:
  """The parts for a prepared run; arguments as in `Trainer.of_run`."""
  base = base or run.base.load()
  lora = lora or run.init_lora(base)
  trainable, frozen = run.place(base, lora)
  return Parts(
    program=run.program,
    hyperparameters=run.hyperparameters,
    lora=lora,
    state=run.program.init_state(trainable) if state is None else state,
    frozen=frozen,
    data=run.data,
    plan=run.plan,
    total_steps=run.steps,
  )


def of_objects(base: Base, lora: Lora, data: Dataset | Iterable[Any], settings: Settings) -> Parts:
  """The parts for objects, which stay the caller's: the step donates copies.

  Args:
    base: the base, loaded.
    lora: where training starts.
    data: a `Dataset` or batches.
    settings: how to train.

  Raises:
    ValueError: the first thing that does not fit, with its remedy.
  """
  settings.check()
  members = None if lora.is_single else len(lora.configs)
  _check_trainable(settings.trainable, lora)
  shapes = lora.shapes()
  factors_lib.check_fit(base.config, shapes, base.scan_layers)
  make, rates = make_optimizer(settings, members)
  program = Program(
    model=dataclasses.replace(
      base.model, transformer=base.transformer.clone(dropout=dropout(lora))
    ),
    mesh=base.mesh,
    variables={'params': pytree.shapes(base.params), 'lora': shapes},
    trainable=settings.trainable,
    loss_fn=settings.loss_fn,
    make_optimizer=make,
    members=members,
    accumulate_steps=settings.accumulate_steps,
    seed=settings.seed,
    remat=settings.remat,
  )
  seeds = None if members is None else np.full(members, settings.seed, np.uint32)
  lora = dataclasses.replace(lora, reference=base.reference)
  plan = None
  if isinstance(data, Dataset):
    parts = settings.accumulate_steps * sharding.batch_parts(base.mesh)
    require(
      settings.batch_size % parts == 0,
      'batch_size',
      settings.batch_size,
      f'a multiple of {parts}: accumulate_steps times the parts in which the mesh splits rows',
    )
    plan = data.plan(settings.seed, settings.batch_size)
    lora = dataclasses.replace(lora, trained_with=TrainedWith.of(data.config))
  leaves, frozen = state_lib.split(place(program, base.params, lora), settings.trainable)
  return Parts(
    program=program,
    hyperparameters=Hyperparameters(np.asarray(lora.scale, np.float32), rates, seeds),
    lora=lora,
    state=program.init_state(jax.tree.map(jnp.copy, leaves)),
    frozen=frozen,
    data=data,
    plan=plan,
    total_steps=settings.total_steps,
  )


def facts(
  base: Base, lora: Lora, data: Dataset | Iterable[Any], settings: Settings
) -> dict[str, Any]:
  """What must be the same for a trainer to resume in a workdir; JSON-able."""
  own, rate = settings.optimizer, settings.learning_rate
  is_planned = isinstance(data, Dataset)
  is_theirs = isinstance(own, optax.GradientTransformation)
  return {
    'base': base.source.fingerprint(),
    'lora': f'{lora.configs} {saves.digest((lora.factors, lora.trained_base))}',
    'data': data.fingerprint() if is_planned else None,
    'batch_size': settings.batch_size if is_planned else None,
    'accumulate_steps': settings.accumulate_steps,
    'trainable': list(settings.trainable),
    'seed': settings.seed,
    'loss_fn': identity.of_function(settings.loss_fn),
    'optimizer': identity.of_function(own) if is_theirs else repr(own),
    'learning_rate': None if rate is None else np.asarray(rate).tolist(),
    'total_steps': settings.total_steps,
  }


def _check_trainable(trainable: Sequence[str], lora: Lora) -> None:
  if lora.trained_base and any(not pattern.startswith('lora') for pattern in trainable):
    raise ValueError(
      f'trainable: got {trainable} and an adapter that already has trained leaves of its base, '
      'expected adapters only; merge it (Lora.merge, launch.convert) and train on that.'
    )
  if not lora.is_single and trainable != ('lora/',):
    raise ValueError(
      f"trainable: got {trainable}, expected ('lora/',): several adapters share all "
      'else. Train them one by one.'
    )


def place(program: Program, params: pytree.Tree, lora: Lora) -> dict[str, Any]:
  """{'params', 'lora'} on the mesh; leaves of the base stay where they are."""
  state, frozen = program.abstract
  placed = jax.tree.map(lambda x: x.sharding, state_lib.join(state.trainable, frozen))
  put = lambda x, where: sharding.put(hosts.to_numpy(x), where)
  replaced = align.replace_leaves(params, lora.trained_base)
  params = jax.tree.map(
    lambda x, old, where: old if x is old else put(x, where), replaced, params, placed['params']
  )
  return {'params': params, 'lora': put(lora.factors, placed['lora'])}


def dropout(lora: Lora) -> float:
  """The dropout rate of all adapters; ValueError if they differ."""
  rates = {config.dropout for config in lora.configs}
  if len(rates) > 1:
    raise ValueError(f'lora.dropout: got {sorted(rates)}, expected one rate for all adapters.')
  return rates.pop()


def make_optimizer(
  settings: Settings, members: int | None
) -> tuple[step_lib.MakeOptimizer, np.ndarray | None]:
  """(what makes the optimizer, the learning rates [K] of several adapters)."""
  given, learning_rate = settings.optimizer, settings.learning_rate
  if isinstance(given, optax.GradientTransformation):
    if learning_rate is not None:
      raise ValueError(
        'learning_rate: got one beside an optimizer of your own, expected none; it has its own.'
      )
    frozen = optimizer_lib.freeze(given, settings.trainable)
    # The step of several is given a rate for each, which this optimizer ignores.
    rates = None if members is None else np.full(members, np.nan, np.float32)
    return lambda learning_rate: (frozen, None), rates
  config = given or OptimizerConfig()
  if config.schedule != 'constant' and settings.total_steps is None:
    raise ValueError(
      f'total_steps: got none, expected the number of updates: optimizer.schedule='
      f'{config.schedule!r} decays over them.'
    )
  rates = np.asarray(config.learning_rate if learning_rate is None else learning_rate)
  if rates.dtype.kind not in 'iuf' or rates.shape not in ((), (members,)):
    several = '' if members is None else f', or one for each of {members} adapters'
    raise ValueError(f'learning_rate: got {learning_rate!r}, expected a number{several}.')
  rates = rates.astype(np.float32)
  for rate in rates.ravel().tolist():
    dataclasses.replace(config, learning_rate=rate).check()
  if members is None:
    rate = config.learning_rate if learning_rate is None else float(np.asarray(learning_rate))
    config = dataclasses.replace(config, learning_rate=rate)
  make = prepare_lib.make_optimizer(config, settings.total_steps or 1, settings.trainable)
  return make, None if members is None else np.broadcast_to(rates, members)
