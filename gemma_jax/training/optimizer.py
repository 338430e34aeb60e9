"""AdamW with warm-up, clipping and a freeze, as one optax transformation.

The freeze is outermost (`optax.selective_transform`): frozen leaves get zero
updates and are never clipped, decayed or given moments. (`optax.masked` would let
their raw gradients through as updates.) The train step passes only the
trainable leaves, so base gradients are not even traced; the freeze still holds
for callers who pass a whole tree.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from gemma_jax import pytree
from gemma_jax.config.train import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Learning rate of update 0, 1, ..., steps - 1.

  Linear warm-up over `warmup_steps` (the first update already learns: its rate
  is peak / warmup_steps), then constant, or linear or cosine decay that would
  reach zero at update `steps`. A warm-up longer than the run just never ends.

  >>> schedule = make_schedule(OptimizerConfig(1.0, 'linear', warmup_steps=2), steps=6)
  >>> [float(schedule(step)) for step in range(6)]
  [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]

  Args:
    config: peak, shape and warm-up.
    steps: updates in the run.

  Returns:
    Function of the number of finished updates.
  """
  decay_steps = max(steps - config.warmup_steps, 1)

  def schedule(step):
    warmup = jnp.minimum((step + 1) / max(config.warmup_steps, 1), 1.0)
    done = jnp.clip((step - config.warmup_steps) / decay_steps, 0.0, 1.0)
    if config.schedule == 'linear':
      decay = 1.0 - done
    elif config.schedule == 'cosine':
      decay = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
    else:
      decay = 1.0
    return config.learning_rate * warmup * decay

  return schedule


def make_optimizer(
  config: OptimizerConfig, steps: int, trainable: Sequence[str]
) -> optax.GradientTransformation:
  """Clipping by global norm, then AdamW; frozen where no regex matches.

  Args:
    config: see `OptimizerConfig`.
    steps: updates in the run, for the schedule.
    trainable: regexes over tree paths, as in `TrainConfig.trainable`.

  Returns:
    Transformation whose state holds moments of the trainable leaves only.
  """
  # Scales and magnitudes are lengths: decay would shrink the base with them.
  decayed = lambda tree: pytree.map_with_name(
    lambda name, _: not name.endswith(('/scale', '/lora_magnitude')), tree
  )
  adamw = optax.adamw(
    make_schedule(config, steps),
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    mask=decayed,
  )
  if config.clip_norm > 0:
    adamw = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)

  return freeze(adamw, trainable)


def freeze(
  tx: optax.GradientTransformation, trainable: Sequence[str]
) -> optax.GradientTransformation:
  """A transformation that sees only the trainable leaves; others get zero updates."""

  def frozen(tree):
    return jax.tree.map(lambda m: not m, pytree.mask(tree, trainable))

  return _selective(tx, frozen)


def _selective(inner, frozen) -> optax.GradientTransformation:
  """`optax.selective_transform` whose mask is a function of the tree given."""
  at = lambda tree: optax.selective_transform(inner, freeze_mask=frozen(tree))
  return optax.GradientTransformation(
    init=lambda params: at(params).init(params),
    update=lambda updates, state, params=None: at(updates).update(updates, state, params),
  )
