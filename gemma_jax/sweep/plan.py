"""How many trials train at once, from the memory that the compiled step needs."""

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

# Share of a device's memory for the training step; the rest is for evaluation.
SHARE = 0.9


def groups(configs: dict[str, TrainConfig]) -> list[list[str]]:
  """Groups the names of trials that could train as one batch, in order.

  Args:
    configs: resolved, by the trial's name.
  """
  by_fields: dict[str, list[str]] = {}
  for name, config in configs.items():
    fields = batched.common_fields(config)
    by_fields.setdefault(json.dumps(fields, sort_keys=True), []).append(name)
  return list(by_fields.values())


def shape_key(configs: Sequence[TrainConfig]) -> tuple[Any, ...]:
  """Groups with equal keys need the same memory: only their seeds differ."""
  largest = max(config.lora.rank for config in configs)
  return len(configs), largest, configs[0].lora.targets


def split(
  configs: Sequence[TrainConfig], max_size: int = 0, limit_bytes: int = 0
) -> list[list[int]]:
  """Divides trials that could train as one batch into batches that fit, and logs it.

  Args:
    configs: resolved; `batched.common_fields` are equal.
    max_size: most adapters in a batch; 0 is any number.
    limit_bytes: for a training step, per device; 0 is a share of what the device has.

  Returns:
    Indices of the trials of each batch, in order, in batches of nearly equal size.
  """
  # No trial's step has larger shapes than that of the largest rank.
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
      'the GiB that a step may take. Set grid.memory_gib=GIB.'
    )
  return int(SHARE * limit)


def divide(
  count: int, peak: Callable[[int], int], *, max_size: int, limit_bytes: int, base_bytes: int
) -> list[list[int]]:
  """Searches for the largest batches of adapters that fit.

  Args:
    count: trials that could train as one batch.
    peak: adapters in a batch → bytes that its step needs, per device.
    max_size: as in `split`.
    limit_bytes: for a step, per device.
    base_bytes: the part of `peak` that all members share.

  Returns:
    As `split`.
  """
  parts = math.ceil(count / (max_size or count))
  while True:
    size = math.ceil(count / parts)
    needed = peak(size)
    logging.info(
      'A batch of %d adapters needs %s of %s',
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
      'A training step needs %s, but only %s are available: it may fail.',
      summary.format_bytes(needed),
      summary.format_bytes(limit_bytes),
    )
  if parts > 1:
    logging.info('%d trials are trained as %d batches of adapters', count, parts)
  ends = [round(count * i / parts) for i in range(parts + 1)]
  return [list(range(*pair)) for pair in itertools.pairwise(ends)]


def peak_bytes(outline: prepare_lib.Outline, size: int, limit_bytes: int) -> int:
  """Bytes of the training step, per device: arguments, temporaries, new outputs.

  Args:
    outline: of the largest trial.
    size: adapters that train at once.
    limit_bytes: of a device; twice that stands for a step that the TPU compiler
      rejects without saying what it needs.
  """
  try:
    program = outline.program(outline.config.steps or 1, size)
    batch = prepare_lib.abstract_batch(program, outline.config)
    return compiler.memory_bytes(program.compile_train_step(batch))
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    return 2 * limit_bytes
