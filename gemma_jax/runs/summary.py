"""The parameter table, from shapes alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gemma_jax import pytree
from gemma_jax.config.train import TrainConfig
from gemma_jax.model.config import ModelConfig
from gemma_jax.training import optimizer
from gemma_jax.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class Summary:
  """Counts and bytes of a run's parts, in table order.

  Attributes:
    counts: name → array elements.
    sizes_bytes: name → bytes in the arrays' own dtypes.
    rows: (path, shape, dtype, parameters, trainable) of every leaf.
  """

  counts: dict[str, int]
  sizes_bytes: dict[str, int]
  rows: tuple[tuple[str, tuple[int, ...], str, int, bool], ...]

  def to_json(self) -> dict[str, int]:
    """{'base': ..., 'base_bytes': ..., ...}."""
    result = {}
    for name, count in self.counts.items():
      result[name] = count
      result[f'{name}_bytes'] = self.sizes_bytes[name]
    return result

  def table(self, leaves: bool = True) -> str:
    """Aligned text: every leaf (on demand), then the totals."""
    lines = []
    if leaves:
      width = max(len(row[0]) for row in self.rows)
      header = f'{"path":<{width}}  {"shape":<24} {"dtype":<8} '
      lines.append(f'{header} {"parameters":>15}  trained')
      for path, shape, dtype, count, trained in self.rows:
        lines.append(
          f'{path:<{width}}  {shape!s:<24} {dtype:<8} {count:>15,}  {"yes" if trained else "-"}'
        )
      lines.append('')
    for name, count in self.counts.items():
      size = format_bytes(self.sizes_bytes[name])
      lines.append(f'{name.replace("_", " "):<22}{count:>16,}  {size:>11}')
    return '\n'.join(lines)


def summarize(config: TrainConfig, model_config: ModelConfig, dtype: Any = jnp.float32) -> Summary:
  """Counts a run's parameters without making any.

  Args:
    config: resolved; gives adapter, trainable mask and optimizer.
    model_config: architecture.
    dtype: of the base.
  """
  variables = state_lib.abstract_variables(
    model_config, config.lora, dtype, config.model.scan_layers
  )
  trainable, frozen = state_lib.split(variables, config.trainable)
  tx = optimizer.make_optimizer(config.optimizer, 1, config.trainable)
  return of_state(jax.eval_shape(lambda t: state_lib.init_state(t, tx), trainable), frozen)


def of_state(state: state_lib.TrainState, frozen: Any) -> Summary:
  """Counts those of a training state, arrays or shapes.

  Args:
    state: trainable leaves and optimizer.
    frozen: the other leaves.

  Returns:
    `base`, `adapter`, `model_total`, `trainable`, `frozen`, `optimizer` (its
    moments and counters) and `total_with_optimizer`.
  """
  trainable = state.trainable
  variables = state_lib.join(trainable, frozen)
  parts = {
    'base': variables['params'],
    'adapter': variables.get('lora', {}),
    'model_total': variables,
    'trainable': trainable,
    'frozen': frozen,
    'optimizer': state.opt_state,
    'total_with_optimizer': (variables, state.opt_state),
  }
  trained = {name for name, _ in pytree.items(trainable)}
  return Summary(
    counts={name: pytree.num_params(tree) for name, tree in parts.items()},
    sizes_bytes={name: pytree.num_bytes(tree) for name, tree in parts.items()},
    rows=tuple(
      (name, x.shape, str(x.dtype), pytree.num_params(x), name in trained)
      for name, x in pytree.items(variables)
    ),
  )


def format_bytes(size: int) -> str:
  """1536 → '1.50 KiB'."""
  value = float(size)
  for unit in ('B', 'KiB', 'MiB', 'GiB'):
    if value < 1024 or unit == 'GiB':
      break
    value /= 1024
  return f'{size} B' if unit == 'B' else f'{value:.2f} {unit}'
