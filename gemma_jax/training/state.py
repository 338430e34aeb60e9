"""What a run changes: step, trainable leaves, optimizer state. Nothing else.

The frozen base is not part of the state: it is a separate argument of the step,
never donated, never returned and never saved. Variables are split by one mask,
`TrainConfig.trainable` over paths 'params/...' (the base) and 'lora/...'.
"""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from gemma_jax import pytree
from gemma_jax.config.lora import LoraConfig
from gemma_jax.lora import factors
from gemma_jax.model import layout
from gemma_jax.model.config import ModelConfig

# Of the random streams of one seed, the one for dropout; `lora.INIT_STREAM` is
# another.
DROPOUT_STREAM = 1


@struct.dataclass
class TrainState:
  """The changing part of a run.

  Attributes:
    step: int32 [], finished updates.
    trainable: variables {'params', 'lora'} with `optax.MaskedNode` where a
      leaf is frozen; float32.
    opt_state: the optimizer's, for the trainable leaves.
  """

  step: jax.Array
  trainable: Any
  opt_state: Any


def split(variables: Any, patterns) -> tuple[Any, Any]:
  """Variables → (trainable, frozen), trained leaves in float32.

  Raises:
    ValueError: a pattern that matches no leaf.
  """
  for pattern in patterns:
    if not any(jax.tree.leaves(pytree.mask(variables, (pattern,)))):
      some = [name for name, _ in pytree.items(variables)][:4]
      raise ValueError(
        f'trainable: {pattern!r} matches no leaf, expected a regex that '
        f'matches a path from its start, such as one of {some}.'
      )
  mask = pytree.mask(variables, patterns)
  trainable, frozen = pytree.partition(variables, mask)
  return jax.tree.map(_float32, trainable), frozen


def init_state(trainable: Any, tx: optax.GradientTransformation) -> TrainState:
  """The state before the first update."""
  return TrainState(step=jnp.int32(0), trainable=trainable, opt_state=tx.init(trainable))


def _float32(x):
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(x.shape, jnp.float32)
  return x.astype(jnp.float32)


def abstract_variables(
  model_config: ModelConfig, lora_config: LoraConfig, dtype: Any, scan_layers: bool = True
) -> dict[str, Any]:
  """{'params', 'lora'} as `jax.ShapeDtypeStruct`s.

  Args:
    model_config: architecture.
    lora_config: the adapter's.
    dtype: the base's.
    scan_layers: whether layers are stacked.
  """
  params = layout.abstract_params(model_config, dtype, scan_layers)
  key = jax.random.key(0)
  adapter = jax.eval_shape(lambda: factors.init(key, model_config, lora_config, scan_layers))
  return {'params': params, 'lora': adapter}


def join(trainable: Any, frozen: Any) -> dict[str, Any]:
  """Undoes `split`: the variables that the model takes."""
  return pytree.prune(pytree.combine(trainable, frozen))
