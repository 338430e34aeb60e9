"""From what a `Trainer` is given to what a `Program` takes, checked."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax

from gemma_jax import pytree
from gemma_jax.config.train import OptimizerConfig
from gemma_jax.lora import align
from gemma_jax.lora.lora import Lora
from gemma_jax.runs import hosts
from gemma_jax.runs import prepare as prepare_lib
from gemma_jax.runs.program import Program
from gemma_jax.training import optimizer as optimizer_lib
from gemma_jax.training import sharding
from gemma_jax.training import state as state_lib
from gemma_jax.training import step as step_lib


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


def loss_name(loss_fn: step_lib.LossFn) -> str:
  """By which a workdir knows a loss; of a partial, with its arguments."""
  if isinstance(loss_fn, functools.partial):
    return f'{loss_name(loss_fn.func)} {loss_fn.args} {loss_fn.keywords}'
  owner = loss_fn if hasattr(loss_fn, '__qualname__') else type(loss_fn)
  return f'{owner.__module__}.{owner.__qualname__}'


def dropout(lora: Lora) -> float:
  """The rate that all adapters have; ValueError if they differ."""
  rates = {config.dropout for config in lora.configs}
  if len(rates) > 1:
    raise ValueError(f'lora.dropout: got {sorted(rates)}, expected one rate for all adapters.')
  return rates.pop()


def make_optimizer(
  given: OptimizerConfig | optax.GradientTransformation | None,
  learning_rate: float | Sequence[float] | None,
  total_steps: int | None,
  trainable: Sequence[str],
  members: int | None,
) -> tuple[step_lib.MakeOptimizer, np.ndarray | None]:
  """(what makes the optimizer, the learning rates [K] of several adapters)."""
  if given is not None and not isinstance(given, OptimizerConfig):
    if learning_rate is not None:
      raise ValueError(
        'learning_rate: got one beside an optimizer of your own, expected none; it has its own.'
      )
    frozen = optimizer_lib.freeze(given, trainable)
    # The step of several is given a rate for each, which this optimizer ignores.
    rates = None if members is None else np.full(members, np.nan, np.float32)
    return lambda learning_rate: (frozen, None), rates
  config = given or OptimizerConfig()
  if config.schedule != 'constant' and total_steps is None:
    raise ValueError(
      f'total_steps: got none, expected the number of updates: optimizer.schedule='
      f'{config.schedule!r} decays over them.'
    )
  rates = np.asarray(config.learning_rate if learning_rate is None else learning_rate, np.float32)
  if rates.shape not in ((), (members,)):
    raise ValueError(
      f'learning_rate: got {rates.size} rates, expected one, or one for each of '
      f'{members or 1} adapter(s).'
    )
  for rate in rates.ravel().tolist():
    dataclasses.replace(config, learning_rate=rate).check()
  if members is None:
    rate = config.learning_rate if learning_rate is None else float(np.asarray(learning_rate))
    config = dataclasses.replace(config, learning_rate=rate)
  make = prepare_lib.make_optimizer(config, total_steps or 1, tuple(trainable))
  return make, None if members is None else np.broadcast_to(rates, members)
