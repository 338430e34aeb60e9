"""One pure training step, and the forward pass that it shares with evaluation.

Gradients are taken with respect to the trainable leaves only: those of a frozen
base are never traced, so there is nothing for the compiler to remove.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemma_jax.lora import factors
from gemma_jax.model.transformer import Transformer
from gemma_jax.training import losses
from gemma_jax.training import state as state_lib
from gemma_jax.training.state import DROPOUT_STREAM, TrainState

Batch = dict[str, jax.Array]


def hidden_states(
  model: Transformer,
  variables: Any,
  scale: float | jax.Array,
  batch: Batch,
  dropout_key: jax.Array | None = None,
) -> jax.Array:
  """The model's output [B, T, D] for a batch, adapter scaled and applied.

  Args:
    model: the transformer.
    variables: {'params': base, 'lora': factors as trained} ('lora' optional).
    scale: `LoraConfig.scale`.
    batch: `tokens`, `segment_ids`, `positions`, int32 [B, T].
    dropout_key: switches adapter dropout on.
  """
  variables = dict(variables)
  if variables.get('lora'):
    _check_form(variables)
    variables['lora'] = factors.with_gains(
      factors.effective(variables['lora'], scale), variables['params']
    )
  return model.apply(
    variables,
    batch['tokens'],
    batch['segment_ids'],
    batch['positions'],
    rngs=None if dropout_key is None else {'dropout': dropout_key},
  )


def make_train_step(
  model: Transformer,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  *,
  scale: float | jax.Array,
  num_pieces: int | None,
  accumulate_steps: int = 1,
  seed: int | jax.Array = 0,
  skip_nonfinite: bool = False,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, Any]]]:
  """Makes step(state, frozen, batch) -> (state, metrics).

  The batch [B, T] is computed in `accumulate_steps` parts; row i goes to part
  i mod parts, so that every device keeps its own rows. Losses and gradients are
  summed over parts and divided once by all supervised tokens, so the result
  does not depend on the number of parts.

  Args:
    model: the transformer.
    tx: from `optimizer.make_optimizer`.
    schedule: the same learning rate that tx follows, for the metrics.
    scale: `LoraConfig.scale`.
    num_pieces: the tokenizer's pieces; later embedding rows are masked.
    accumulate_steps: parts of a batch.
    seed: of dropout; its key is a function of (seed, step, part).
    skip_nonfinite: a loss or gradient that is not finite changes neither
      weights nor moments; counts go on, so that the schedule does.

  Returns:
    A pure function; metrics are float32 scalars: `loss` (nats per supervised
    token), `supervised_tokens`, `tokens` (padding not counted), `grad_norm`
    (before clipping) and `learning_rate`.
  """

  def loss_sum(trainable, frozen, batch, key):
    variables = state_lib.join(trainable, frozen)
    hidden = hidden_states(model, variables, scale, batch, key if model.dropout > 0 else None)
    token_losses = losses.token_cross_entropy(
      hidden,
      variables['params']['embedder']['input_embedding'],
      batch['targets'],
      batch['weights'],
      softcap=model.config.final_softcap,
      num_pieces=num_pieces,
      sharding=model.hidden_sharding,
      plain_gradients=model.plain_gradients,
    )
    return jnp.sum(token_losses)

  def step(state: TrainState, frozen: Any, batch: Batch):
    key = jax.random.fold_in(jax.random.key(seed), DROPOUT_STREAM)
    key = jax.random.fold_in(key, state.step)
    grad_fn = jax.value_and_grad(loss_sum)

    def part(carry, xs):
      index, batch = xs
      new = grad_fn(state.trainable, frozen, batch, jax.random.fold_in(key, index))
      return jax.tree.map(jnp.add, carry, new), None

    parts = jax.tree.map(lambda x: _split_rows(x, accumulate_steps), batch)
    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), state.trainable))
    if accumulate_steps == 1:
      (loss, grads), _ = part(zeros, (0, jax.tree.map(lambda x: x[0], parts)))
    else:
      indices = jnp.arange(accumulate_steps)
      (loss, grads), _ = jax.lax.scan(part, zeros, (indices, parts))

    tokens = jnp.sum(batch['weights'])
    per_token = 1.0 / jnp.maximum(tokens, 1.0)
    grads = jax.tree.map(lambda g: g * per_token, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
    metrics = {
      'loss': loss * per_token,
      'supervised_tokens': tokens,
      'tokens': jnp.sum(batch['segment_ids'] > 0, dtype=jnp.float32),
      'grad_norm': optax.tree.norm(grads),
      'learning_rate': jnp.float32(schedule(state.step)),
    }
    new = TrainState(
      step=state.step + 1,
      trainable=optax.apply_updates(state.trainable, updates),
      opt_state=opt_state,
    )
    if skip_nonfinite:
      is_finite = jnp.isfinite(metrics['loss'] + metrics['grad_norm'])
      new = jax.tree.map(
        lambda x, old: jnp.where(is_finite, x, old) if jnp.issubdtype(x.dtype, jnp.inexact) else x,
        new,
        state,
      )
    return new, metrics

  return step


def make_eval_step(
  model: Transformer, *, scale: float | jax.Array, num_pieces: int | None
) -> Callable[[Any, Batch], jax.Array]:
  """Makes eval_step(variables, batch) -> weighted losses, float32 [B, T].

  Args:
    model: the transformer.
    scale: `LoraConfig.scale`, or 1 for factors that hold it
      (`factors.effective`).
    num_pieces: as in `make_train_step`.
  """

  def eval_step(variables, batch):
    return losses.token_cross_entropy(
      hidden_states(model, variables, scale, batch),
      variables['params']['embedder']['input_embedding'],
      batch['targets'],
      batch['weights'],
      softcap=model.config.final_softcap,
      num_pieces=num_pieces,
      sharding=model.hidden_sharding,
      plain_gradients=model.plain_gradients,
    )

  return eval_step


def _check_form(variables: Any) -> None:
  """ValueError for an adapter that the model would not find."""
  base, adapter = (
    'scanned' if 'layers' in variables[name] else 'unrolled' for name in ('params', 'lora')
  )
  if base != adapter:
    raise ValueError(
      f'lora: got a {adapter} adapter for a {base} base, expected one form; '
      'see layout.stack_layers and layout.unstack_layers.'
    )


def _split_rows(x: jax.Array, parts: int) -> jax.Array:
  """[B, T] → [parts, B / parts, T], row i in part i mod parts."""
  x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
  return jax.numpy.swapaxes(x, 0, 1)
