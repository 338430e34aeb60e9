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
from gemma_jax.config.train import TrainConfig
from gemma_jax.lora import factors as factors_lib
from gemma_jax.model import layout
from gemma_jax.model.config import ModelConfig

# Streams of random numbers drawn from one seed.
INIT_STREAM, DROPOUT_STREAM = 0, 1


@struct.dataclass
class TrainState:
  """The changing part of a run.

  Attributes:
    step: int32 [], finished updates.
    trainable: variables {'params', 'lora'} with `optax.MaskedNode` where a
      leaf is frozen; float32.
    opt_state: of the trainable leaves.
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
        f'matches a path from its start; paths are such as {some}.'
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
  config: TrainConfig, model_config: ModelConfig, dtype: Any
) -> dict[str, Any]:
  """{'params', 'lora'} of a run as `jax.ShapeDtypeStruct`s.

  Args:
    config: gives the adapter and the form of the tree.
    model_config: architecture.
    dtype: of the base.
  """
  scan = config.model.scan_layers
  params = layout.abstract_params(model_config, dtype, scan)
  adapter = jax.eval_shape(lambda params: init_adapter(config, model_config, params), params)
  return {'params': params, 'lora': adapter}


def init_adapter(config: TrainConfig, model_config: ModelConfig, params: Any = None) -> Any:
  """The adapter before the first update; a function of the seed.

  Args:
    config: gives seed, adapter and the form of the tree.
    model_config: architecture.
    params: the base, of which DoRA takes its magnitudes; else not needed.

  Raises:
    ValueError: DoRA without a base.
  """
  if config.lora.dora and params is None:
    raise ValueError('lora.dora: got no base, expected the one it starts from.')
  key = jax.random.fold_in(jax.random.key(config.seed), INIT_STREAM)
  scan = config.model.scan_layers
  factors = factors_lib.init(key, model_config, config.lora, scan)
  return factors_lib.with_magnitudes(factors, params or {})


def join(trainable: Any, frozen: Any) -> dict[str, Any]:
  """Undoes `split`: the variables that the model takes."""
  return pytree.prune(pytree.combine(trainable, frozen))
