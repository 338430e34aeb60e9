"""K adapters trained at once on one base: the same step, mapped.

Adapters may differ in rank, scale, learning rate, seed and initial A; they see
the same batches. The base lives once in memory and the step is compiled once.
Ranks are padded with zeros (`lora.align.stack`); what differs enters the step
as `Hyperparameters` [K]. Leaves have a leading axis K.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemma_jax.training.state import TrainState
from gemma_jax.training.step import Hyperparameters

# Positions that keep a CPU busy: two mapped rows of 512 took as long as one
# after the other, and more memory.
_CPU_POSITIONS = 768


def init_state(trainable: Any, tx: optax.GradientTransformation) -> TrainState:
  """The state before the first update, from leaves [K, ...]."""
  return TrainState(jnp.int32(0), trainable, jax.vmap(tx.init)(trainable))


def map_train_step(step: Callable[..., Any], at_once: int | None = None) -> Callable[..., Any]:
  """One adapter's step → a step for K; signatures as in `training.step`.

  Args:
    step: from `make_train_step`.
    at_once: adapters mapped at a time, a divisor of K; None maps all.

  Returns:
    A pure function; state and metrics have a leading axis K, except
    for the step count, which the adapters share.
  """

  def mapped(state: TrainState, hyper: Hyperparameters, frozen: Any, batch: Any):
    def one(leaves, hyper):
      new, metrics = step(TrainState(state.step, *leaves), hyper, frozen, batch)
      return (new.trainable, new.opt_state), metrics

    leaves, metrics = _map(one, ((state.trainable, state.opt_state), hyper), at_once)
    return TrainState(state.step + 1, *leaves), metrics

  return mapped


def map_eval_step(step: Callable[..., Any], at_once: int | None = None) -> Callable[..., Any]:
  """The same for `make_eval_step`: losses [K, B, T]."""

  def mapped(trainable: Any, hyper: Hyperparameters, frozen: Any, batch: Any):
    one = lambda trainable, hyper: step(trainable, hyper, frozen, batch)
    return _map(one, (trainable, hyper), at_once)

  return mapped


def mapped_at_once(members: int, num_positions: int, platform: str) -> int:
  """How many of K adapters a step maps at a time: a divisor of K.

  On a CPU, as many as fill its cores; groups run one after the other inside the
  step, since more at once would cost memory and cache and gain nothing.

  Args:
    members: K.
    num_positions: positions in a batch, or in a part of it.
    platform: e.g. 'cpu'.
  """
  if platform != 'cpu':
    return members
  most = max(1, _CPU_POSITIONS // num_positions)
  return max(n for n in range(1, most + 1) if members % n == 0)


def _map(fn: Callable[..., Any], args: tuple[Any, ...], at_once: int | None) -> Any:
  """fn of each adapter, `at_once` of them mapped at a time."""
  if at_once in (None, jax.tree.leaves(args)[0].shape[0]):
    return jax.vmap(fn)(*args)
  return jax.lax.map(lambda xs: fn(*xs), args, batch_size=at_once)
