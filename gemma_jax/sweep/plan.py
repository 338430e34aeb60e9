"""How many cells train at once: what the compiled step says that it needs."""

from collections.abc import Sequence
import itertools
import math

from absl import logging
import jax

from gemma_jax import compiler, gang, pytree, summary
from gemma_jax import run as run_lib
from gemma_jax.config import TrainConfig

# Of the memory that a device may hold; the rest is for evaluation's.
_SHARE = 0.9


def split(
  configs: Sequence[TrainConfig], max_size: int = 0, limit_bytes: int = 0
) -> list[list[int]]:
  """Divides cells that could be one gang into gangs that fit, and says so.

  Args:
    configs: resolved; `gang.common_fields` are equal.
    max_size: of a gang; 0 is any.
    limit_bytes: for a training step, per device; 0 is a share of what is there.

  Returns:
    Indices of the cells of each gang, in order, in gangs of almost one size.
  """
  count = len(configs)
  parts = math.ceil(count / (max_size or count))
  # The steps of all cells have the largest rank's shapes, at most.
  largest = max(configs, key=lambda config: config.lora.rank)
  shared = run_lib.prepare_program(largest)
  base_bytes = pytree.num_bytes(shared.abstract[1])
  limit_bytes = limit_bytes or int(
    _SHARE * compiler.memory_limit_bytes(shared.mesh)
  )
  while True:
    size = math.ceil(count / parts)
    peak = peak_bytes(gang.Gang([largest] * size, shared), limit_bytes)
    logging.info(
      'A gang of %d needs %s of %s', size, summary.format_bytes(peak),
      summary.format_bytes(limit_bytes),
    )  # fmt: skip
    if peak <= limit_bytes or size == 1:
      break
    each = (peak - base_bytes) / size
    fitting = max(int((limit_bytes - base_bytes) / each), 1)
    parts = max(parts + 1, math.ceil(count / fitting))
  if peak > limit_bytes:
    logging.warning(
      'A training step needs %s and %s are there: it may fail.',
      summary.format_bytes(peak), summary.format_bytes(limit_bytes),
    )  # fmt: skip
  if parts > 1:
    logging.info('%d cells are trained as %d gangs', count, parts)
  ends = [round(count * i / parts) for i in range(parts + 1)]
  return [list(range(*pair)) for pair in itertools.pairwise(ends)]


def peak_bytes(members: gang.Gang, limit_bytes: int) -> int:
  """Of the training step, per device: arguments, temporaries, new outputs.

  Args:
    members: of the gang.
    limit_bytes: of a device; twice that stands for a step that a TPU's compiler
      refuses without saying what it needs.
  """
  try:
    return compiler.memory_bytes(members.compile_train_step())
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    return 2 * limit_bytes
