"""One pure training step, and the loss that evaluation shares with it.

Gradients are taken with respect to the trainable leaves only: those of a frozen
base are never traced, so there is nothing for the compiler to remove.

A loss of your own has the form of `token_loss`:

    def loss_fn(model, variables, batch, key):
      losses = model.token_losses(variables, batch, key)     # [B, T]
      return losses.sum(), batch['weights'].sum(), {}

It returns a sum, the weight that divides it, and metrics by name, each a pair
(sum, weight) as well. Sums and weights are added over the parts of a batch and
divided once, so the result does not depend on the number of parts. `variables`
are as `model.apply` takes them, and without 'lora' they are the base.
"""

from collections.abc import Callable
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from gemma_jax import pytree
from gemma_jax.lora import factors
from gemma_jax.training import state as state_lib
from gemma_jax.training.model import Model
from gemma_jax.training.state import DROPOUT_STREAM, TrainState

# What every step measures.
OWN_METRICS = ('loss', 'weight', 'tokens', 'grad_norm', 'learning_rate')

# Any pytree whose leaves have rows as their leading axis.
Batch = Any
LossFn = Callable[
  [Model, Any, Batch, jax.Array | None],
  tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]],
]
# Learning rate of an adapter, or None for the optimizer's own → (optimizer, schedule).
MakeOptimizer = Callable[
  [jax.Array | None], tuple[optax.GradientTransformation, optax.Schedule | None]
]


# An array (NumPy outside the step), or its shape while the step is compiled.
_Leaf = Any


@struct.dataclass
class Hyperparameters:
  """What the step is told about an adapter; [], or [K] for several.

  Attributes:
    scale: the factor on B A.
    learning_rate: None takes the optimizer's own.
    seed: for dropout; None takes the step's own.
  """

  scale: _Leaf
  learning_rate: _Leaf | None = None
  seed: _Leaf | None = None


def token_loss(
  model: Model, variables: Any, batch: Batch, key: jax.Array | None
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
  """Next-token cross-entropy: its sum in nats, the supervised tokens, nothing else."""
  losses = model.token_losses(variables, batch, key)
  return jnp.sum(losses), jnp.sum(batch['weights']), {}


def make_train_step(
  model: Model,
  loss_fn: LossFn,
  make_optimizer: MakeOptimizer,
  *,
  accumulate_steps: int = 1,
  seed: int = 0,
) -> Callable[[TrainState, Hyperparameters, Any, Batch], tuple[TrainState, dict[str, Any]]]:
  """Makes step(state, hyperparameters, frozen, batch) -> (state, metrics).

  The batch is computed in `accumulate_steps` parts; row i goes to part i mod
  parts, so that every device keeps its own rows. A loss or gradient that is not
  finite changes neither weights nor moments; the step is counted, so the
  schedule moves on.

  Args:
    model: the transformer and its tokens.
    loss_fn: see the module.
    make_optimizer: its schedule is the one that the optimizer follows, for the
      metrics; None if unknown.
    accumulate_steps: parts of a batch.
    seed: for dropout; the key is a function of (seed, step, part).

  Returns:
    A pure function; metrics are float32 scalars: `loss` (per unit of weight:
    nats per supervised token), `weight`, `tokens` (padding not counted),
    `grad_norm` (before clipping), `learning_rate` (NaN where there is no
    schedule), and those of `loss_fn`.

  Raises:
    ValueError: when traced, if `loss_fn` returns anything else.
  """

  def sums(trainable, scale, frozen, batch, key):
    variables = state_lib.join(trainable, frozen)
    variables = factors.variables(variables['params'], variables.get('lora'), scale)
    total, weight, metrics = _checked(loss_fn(model, variables, batch, key))
    return total, (weight, metrics)

  def step(state: TrainState, hyper: Hyperparameters, frozen: Any, batch: Batch):
    tx, schedule = make_optimizer(hyper.learning_rate)
    key = jax.random.key(seed if hyper.seed is None else hyper.seed)
    key = jax.random.fold_in(jax.random.fold_in(key, DROPOUT_STREAM), state.step)
    grad_fn = jax.value_and_grad(sums, has_aux=True)

    def one(index, batch):
      part_key = jax.random.fold_in(key, index)
      return grad_fn(state.trainable, hyper.scale, frozen, batch, part_key)

    def part(carry, xs):
      return jax.tree.map(jnp.add, carry, one(*xs)), None

    if accumulate_steps == 1:
      added = one(0, batch)
    else:
      parts = jax.tree.map(lambda x: _split_rows(x, accumulate_steps), batch)
      indices = jnp.arange(accumulate_steps)
      first = jax.tree.map(lambda x: x[0], (indices, parts))
      zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(one, *first))
      added, _ = jax.lax.scan(part, zeros, (indices, parts))
    (total, (weight, metrics)), grads = added

    per_weight = 1.0 / jnp.where(weight == 0, 1.0, weight)
    grads = jax.tree.map(lambda g: g * per_weight, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
    metrics = {name: x / jnp.where(w == 0, 1.0, w) for name, (x, w) in metrics.items()}
    metrics |= {
      'loss': total * per_weight,
      'weight': weight,
      'tokens': _count_tokens(batch),
      'grad_norm': optax.tree.norm(grads),
      'learning_rate': jnp.float32(jnp.nan if schedule is None else schedule(state.step)),
    }
    new = TrainState(
      step=state.step + 1,
      trainable=optax.apply_updates(state.trainable, updates),
      opt_state=opt_state,
    )
    is_finite = jnp.isfinite(metrics['loss'] + metrics['grad_norm'])
    new = jax.tree.map(
      lambda x, old: jnp.where(is_finite, x, old) if jnp.issubdtype(x.dtype, jnp.inexact) else x,
      new,
      state,
    )
    return new, metrics

  return step


def make_eval_step(
  model: Model, loss_fn: LossFn = token_loss
) -> Callable[[Any, Hyperparameters, Any, Batch], Any]:
  """Makes eval_step(trainable, hyperparameters, frozen, batch) -> losses.

  For `token_loss` these are float32 [B, T], weight times nats; for another loss,
  what it returns: (sum, weight, metrics). There is no dropout.
  """

  def eval_step(trainable, hyper, frozen, batch):
    variables = state_lib.join(trainable, frozen)
    variables = factors.variables(variables['params'], variables.get('lora'), hyper.scale)
    if loss_fn is token_loss:
      return model.token_losses(variables, batch)
    return _checked(loss_fn(model, variables, batch, None))

  return eval_step


def _checked(returned: Any) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
  """What a loss returned, if it has the form of `token_loss`."""
  expected = 'expected (sum, weight, metrics): two scalars and a dict of (sum, weight) pairs.'
  if not isinstance(returned, tuple) or len(returned) != 3 or not isinstance(returned[2], dict):
    raise ValueError(f'loss_fn: got {_kind(returned)}, {expected}')
  total, weight, metrics = returned
  named = {'sum': total, 'weight': weight}
  for name, pair in metrics.items():
    if name in OWN_METRICS:
      raise ValueError(f'loss_fn: got a metric named {name!r}, expected none of {OWN_METRICS}.')
    if not isinstance(pair, tuple) or len(pair) != 2:
      raise ValueError(f'loss_fn: got {_kind(pair)} for the metric {name!r}, {expected}')
    named |= {f'sum of {name}': pair[0], f'weight of {name}': pair[1]}
  arrays = {}
  for name, x in named.items():
    is_array = hasattr(x, 'dtype') or isinstance(x, int | float)
    if not is_array or jnp.shape(x) or not jnp.issubdtype(jnp.result_type(x), jnp.number):
      raise ValueError(f'loss_fn: got {_kind(x)} for the {name}, {expected}')
    arrays[name] = jnp.asarray(x, jnp.float32)
  pairs = {name: (arrays[f'sum of {name}'], arrays[f'weight of {name}']) for name in metrics}
  return arrays['sum'], arrays['weight'], pairs


def _kind(x: Any) -> str:
  shape = getattr(x, 'shape', None)
  if shape is not None:
    return f'an array {list(shape)} of {x.dtype}'
  return f'a tuple of {len(x)}' if isinstance(x, tuple) else type(x).__name__


def _count_tokens(batch: Batch) -> jax.Array:
  """Number of positions that are not padding."""
  total = jnp.float32(0)
  for name, x in pytree.items(batch):
    if name.split('/')[-1] == 'segment_ids':
      total += jnp.sum(x > 0, dtype=jnp.float32)
  return total


def _split_rows(x: jax.Array, parts: int) -> jax.Array:
  """[B, ...] → [parts, B / parts, ...], row i in part i mod parts."""
  x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
  return jnp.swapaxes(x, 0, 1)
