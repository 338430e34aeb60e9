"""How many cells train at once: what the compiled step says that it needs."""

from collections.abc import Sequence
import itertools
import math
import os
from pathlib import Path
import re

from absl import logging
import jax

from gemma_jax import compiler, gang, pytree, summary
from gemma_jax import run as run_lib
from gemma_jax.config import TrainConfig

# Of the memory that is there; the rest is for data, evaluation and the host.
_SHARE = 0.8


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
  limit_bytes = limit_bytes or int(_SHARE * available_bytes())
  count = len(configs)
  parts = math.ceil(count / (max_size or count))
  # The steps of all cells have the largest rank's shapes, at most.
  largest = max(configs, key=lambda config: config.lora.rank)
  shared = run_lib.prepare_program(largest)
  base_bytes = pytree.num_bytes(shared.abstract[1])
  while True:
    size = math.ceil(count / parts)
    peak = peak_bytes(gang.Gang([largest] * size, shared))
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


def peak_bytes(members: gang.Gang) -> int:
  """Of the training step, per device: arguments, temporaries, new outputs."""
  try:
    return compiler.memory_bytes(members.compile_train_step())
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    # A TPU's compiler refuses; the halved gang will tell.
    return 2 * available_bytes()


def available_bytes() -> int:
  """Memory of a device; on a CPU, what the machine can still give."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit'] - stats.get('bytes_in_use', 0)
  meminfo = Path('/proc/meminfo')
  if meminfo.exists():
    (found,) = re.findall(r'MemAvailable:\s+(\d+) kB', meminfo.read_text())
    return int(found) * 1024
  return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
