"""How many cells train at once: what the compiled step says that it needs."""

from collections.abc import Callable, Sequence
import itertools
import json
import math
from typing import Any

from absl import logging
import jax
from jax.sharding import Mesh

from gemma_jax import pytree
from gemma_jax.config.train import TrainConfig
from gemma_jax.runs import batched, summary
from gemma_jax.runs import prepare as prepare_lib
from gemma_jax.training import compiler

# Of the memory that a device may hold; the rest is for evaluation's.
SHARE = 0.9


def groups(configs: dict[str, TrainConfig]) -> list[list[str]]:
  """Names of the cells that could be one gang, in order.

  Args:
    configs: resolved, by the cell's name.
  """
  found: dict[str, list[str]] = {}
  for name, config in configs.items():
    fields = batched.common_fields(config)
    found.setdefault(json.dumps(fields, sort_keys=True), []).append(name)
  return list(found.values())


def shape_key(configs: Sequence[TrainConfig]) -> tuple[Any, ...]:
  """Groups with the same need the same memory: their seeds differ alone."""
  largest = max(config.lora.rank for config in configs)
  return len(configs), largest, configs[0].lora.targets


def split(
  configs: Sequence[TrainConfig], max_size: int = 0, limit_bytes: int = 0
) -> list[list[int]]:
  """Divides cells that could be one gang into gangs that fit, and says so.

  Args:
    configs: resolved; `batched.common_fields` are equal.
    max_size: of a gang; 0 is any.
    limit_bytes: for a training step, per device; 0 is a share of what is there.

  Returns:
    Indices of the cells of each gang, in order, in gangs of almost one size.
  """
  # The steps of all cells have the largest rank's shapes, at most.
  largest = max(configs, key=lambda config: config.lora.rank)
  outline = prepare_lib.outline(largest)
  limit_bytes = limit_bytes or _share_of_memory(outline.base.mesh)
  return divide(
    len(configs),
    lambda size: peak_bytes(outline, size, limit_bytes),
    max_size=max_size,
    limit_bytes=limit_bytes,
    base_bytes=pytree.num_bytes(outline.program(1).abstract[1]),
  )


def _share_of_memory(mesh: Mesh) -> int:
  """What a step may take of a device, in bytes."""
  limit = compiler.memory_limit_bytes(mesh)
  if limit is None:
    raise ValueError(
      'grid.memory_gib: got 0, but the devices do not say how much memory they have; expected '
      'the GiB that a step may take. Set --config.grid.memory_gib=GIB.'
    )
  return int(SHARE * limit)


def divide(
  count: int, peak: Callable[[int], int], *, max_size: int, limit_bytes: int, base_bytes: int
) -> list[list[int]]:
  """Searches the largest gangs that fit.

  Args:
    count: cells that could be one gang.
    peak: size of a gang → bytes that its step needs, per device.
    max_size: as in `split`.
    limit_bytes: for a step, per device.
    base_bytes: of `peak`, what is there once for all members.

  Returns:
    As `split`.
  """
  parts = math.ceil(count / (max_size or count))
  while True:
    size = math.ceil(count / parts)
    needed = peak(size)
    logging.info(
      'A gang of %d needs %s of %s',
      size,
      summary.format_bytes(needed),
      summary.format_bytes(limit_bytes),
    )
    if needed <= limit_bytes or size == 1:
      break
    each = (needed - base_bytes) / size
    fitting = max(int((limit_bytes - base_bytes) / each), 1)
    parts = max(parts + 1, math.ceil(count / fitting))
  if needed > limit_bytes:
    logging.warning(
      'A training step needs %s and %s are there: it may fail.',
      summary.format_bytes(needed),
      summary.format_bytes(limit_bytes),
    )
  if parts > 1:
    logging.info('%d cells are trained as %d gangs', count, parts)
  ends = [round(count * i / parts) for i in range(parts + 1)]
  return [list(range(*pair)) for pair in itertools.pairwise(ends)]


def peak_bytes(outline: prepare_lib.Outline, size: int, limit_bytes: int) -> int:
  """Of the training step, per device: arguments, temporaries, new outputs.

  Args:
    outline: of the largest trial.
    size: adapters that train at once.
    limit_bytes: of a device; twice that stands for a step that a TPU's compiler
      refuses without saying what it needs.
  """
  try:
    program = outline.program(outline.config.steps or 1, size)
    batch = prepare_lib.abstract_batch(program, outline.config)
    return compiler.memory_bytes(program.compile_train_step(batch))
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    return 2 * limit_bytes
