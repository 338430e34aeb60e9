"""What a run would need on a TPU slice that is not here: memory, speed, fit.

The real training step, kernels included, is compiled by the TPU's own compiler
from shapes alone: no weight, no record and no TPU is needed.
"""

from collections.abc import Sequence
import dataclasses
import math
import re
from typing import Any

from absl import logging
import jax
import numpy as np

from gemma_jax import pytree
from gemma_jax.config.train import TrainConfig
from gemma_jax.runs import prepare as prepare_lib
from gemma_jax.runs import summary
from gemma_jax.tpu import hlo, roofline
from gemma_jax.tpu.topology import Topology
from gemma_jax.training import compiler, sharding
from gemma_jax.training import state as state_lib

_MAX_ROWS_PER_DEVICE = 4096
_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Forecast:
  """What a run would need; all bytes are per device.

  Attributes:
    outline: base and config, as it would run.
    topology: where it would run.
    needed_bytes: HBM that the compiler needs.
    part_bytes: name → bytes, the parts of `needed_bytes`. `padding` is what the
      arrays' tiles hold besides them. The last three need a compiled program.
    collectives: of a step; empty if it does not fit in memory.
    work: of a step.
    bound: least times; None if it does not fit in memory.
    members: adapters that train at once.
  """

  outline: prepare_lib.Outline
  topology: Topology
  needed_bytes: int
  part_bytes: dict[str, int]
  collectives: Sequence[hlo.Collective]
  work: roofline.Work
  bound: roofline.Bound | None
  members: int = 1

  @property
  def fits(self) -> bool:
    """Whether it fits in memory, the program itself included."""
    hbm_bytes = self.topology.chip.hbm_bytes
    return self.bound is not None and self.needed_bytes <= hbm_bytes

  @property
  def rows_per_device(self) -> int:
    """Rows that a device computes at a time, of one part of an update."""
    return _rows_per_device(self.outline.config, self.outline.base.mesh)

  def to_json(self) -> dict[str, Any]:
    """The same figures with their units in their names."""
    data = self.outline.config.data
    figures = {
      'topology': str(self.topology),
      'mesh': dict(self.outline.base.mesh.shape),
      'global_batch_size': data.global_batch_size,
      'seq_len': data.seq_len,
      'members': self.members,
      'fits': self.fits,
      'needed_bytes': self.needed_bytes,
      'hbm_bytes': self.topology.chip.hbm_bytes,
      **{f'{name}_bytes': size for name, size in self.part_bytes.items()},
      'model_flops': self.work.model_flops,
      'executed_flops': self.work.executed_flops,
    }
    if self.bound is None:
      return figures
    return figures | {
      'collectives': {
        kind: {'executions': count, 'result_bytes': size, 'sent_bytes': sent}
        for kind, count, size, sent in self._by_kind()
      },
      'compute_secs': self.bound.compute_secs,
      'hbm_secs': self.bound.hbm_secs,
      'interconnect_secs': self.bound.interconnect_secs,
      'bound_by': self.bound.bound_by,
      'tokens_per_sec': self.bound.tokens_per_sec,
      'mfu': self.bound.mfu,
    }

  def report(self) -> str:
    """The figures as text; the last line says whether it fits."""
    base, chip = self.outline.base, self.topology.chip
    data, mesh = self.outline.config.data, base.mesh
    lines = [
      f'{self.topology}: {mesh.size} devices as '
      + ' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items()),
      f'{base.reference}: {base.dtype} weights, {np.dtype(base.transformer.dtype)} activations',
      f'{data.global_batch_size} rows x {data.seq_len} positions per update, '
      f'{self.rows_per_device} rows per device at a time',
      *([f'{self.members} adapters at once'] if self.members > 1 else []),
      '',
      'memory, per device',
    ]
    for name, size in self.part_bytes.items():
      lines.append(f'  {name:<36}{summary.format_bytes(size):>12}')
    total = summary.format_bytes(self.needed_bytes)
    hbm = summary.format_bytes(chip.hbm_bytes)
    lines.append(f'  {"peak":<36}{total:>12} of {hbm}')
    if self.bound is None:
      return '\n'.join([*lines, '', f'does not fit: needs {total} of {hbm}'])
    lines += ['', f'{"collectives, per device and step":<38}{"times":>8}{"result":>12}{"sent":>12}']
    for kind, count, size, sent in self._by_kind():
      lines.append(
        f'  {kind:<36}{count:>8}{summary.format_bytes(size):>12}'
        f'{summary.format_bytes(round(sent)):>12}'
      )
    bound = self.bound
    lines += [
      '',
      'lower bound of a step (every position in the loss, all overlapped)',
      f'  {"model FLOPs":<36}{self.work.model_flops:>12.4g}',
      f'  {"FLOPs with recomputation":<36}{self.work.executed_flops:>12.4g}',
      f'  {"compute":<36}{bound.compute_secs * 1e3:>9.2f} ms',
      f'  {"HBM":<36}{bound.hbm_secs * 1e3:>9.2f} ms',
      f'  {"interconnect":<36}{bound.interconnect_secs * 1e3:>9.2f} ms',
      f'bound by {bound.bound_by}: at most {bound.tokens_per_sec:,.0f} '
      f'tokens/s, MFU {bound.mfu:.2f}',
      '',
      f'{"fits" if self.fits else "does not fit"}: needs {total} of {hbm}',
    ]
    return '\n'.join(lines)

  def _by_kind(self) -> list[tuple[str, int, int, float]]:
    """(kind, executions, result bytes, sent bytes) of a step."""
    rows = []
    for kind in hlo.KINDS:
      same = [c for c in self.collectives if c.kind == kind]
      if same:
        size = sum(c.count * c.result_bytes for c in same)
        sent = sum(c.sent_bytes for c in same)
        rows.append((kind, sum(c.count for c in same), size, sent))
    return rows


def forecast(config: TrainConfig, topology: Topology, members: int = 1) -> Forecast:
  """Compiles a run's step for a slice and reads the program.

  A batch that does not divide over the slice is made larger until it does, and
  the log says so: a config made for one device can be forecast on any slice.

  Args:
    config: resolved.
    topology: where it would run.
    members: adapters of this config that train at once; tokens and FLOPs are
      of all of them.

  Raises:
    ValueError: model, mesh and slice do not fit together.
  """
  devices = topology.devices()
  mesh = sharding.make_mesh(config.mesh, devices)
  unit = _rows_per_part(config, mesh)
  rows = unit * math.ceil(config.data.global_batch_size / unit)
  if rows != config.data.global_batch_size:
    logging.warning(
      'Compiling for %d rows per update, not %d, which do not divide over this '
      'mesh; a run on it needs data.global_batch_size=%d.',
      rows,
      config.data.global_batch_size,
      rows,
    )
    config = _with_rows(config, rows)
  outline = prepare_lib.outline(config, devices)
  config = outline.given
  work = roofline.training_step(
    config, outline.base.config, mesh, np.dtype(outline.base.transformer.dtype), members
  )
  # Without records, the steps of a run of epochs are not known.
  program = outline.program(config.steps or 1, members if members > 1 else None)
  batch = prepare_lib.abstract_batch(program, config)
  state, frozen = program.abstract
  variables = state_lib.join(state.trainable, frozen)
  parts = {
    'base': _device_bytes(variables['params']),
    'adapter': _device_bytes(variables['lora']),
    'optimizer': _device_bytes(state.opt_state),
    'batch': _device_bytes(batch),
  }
  draft = Forecast(outline, topology, 0, parts, (), work, None, members)
  try:
    compiled = program.compile_train_step(batch)
  except jax.errors.JaxRuntimeError as e:
    needed = _needed_bytes(str(e))
    if needed is None:
      raise
    return dataclasses.replace(draft, needed_bytes=needed)
  memory = compiler.memory_analysis(compiled)
  parts |= {
    'padding': memory.argument_size_in_bytes - sum(parts.values()),
    'temporaries': memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes,
    'program': memory.generated_code_size_in_bytes,
  }
  text = compiled.as_text()
  assert text is not None  # XLA has one on a TPU
  collectives = hlo.collectives(text, mesh.size)
  tokens = members * config.data.global_batch_size * config.data.seq_len
  return dataclasses.replace(
    draft,
    needed_bytes=sum(parts.values()),
    collectives=collectives,
    bound=roofline.bound(work, collectives, topology.chip, mesh, tokens),
  )


def largest_fit(config: TrainConfig, topology: Topology) -> Forecast:
  """Searches for the largest batch that fits, starting from the config's own.

  The rest of the config stays. Memory grows nearly in proportion to the rows, so
  each compilation tells where to look next.

  Returns:
    The forecast for that batch, or for one row per device if not even that fits.
  """
  mesh = sharding.make_mesh(config.mesh, topology.devices())
  unit = _rows_per_part(config, mesh)
  known: dict[int, Forecast] = {}
  low, high = 0, _MAX_ROWS_PER_DEVICE + 1  # fits, does not
  guess = min(max(config.data.global_batch_size // unit, 1), high - 1)
  while high - low > 1:
    known[guess] = forecast(_with_rows(config, unit * guess), topology)
    logging.info(
      '%d rows per device: %s of %s',
      guess,
      summary.format_bytes(known[guess].needed_bytes),
      summary.format_bytes(topology.chip.hbm_bytes),
    )
    low, high = (guess, high) if known[guess].fits else (low, guess)
    guess = _next_guess(known, low, high, topology.chip.hbm_bytes)
  return known[max(low, 1)]


def _next_guess(known, low: int, high: int, capacity: int) -> int:
  """The rows, between low and high, at which a line through the two nearest is full.

  With a single forecast it assumes that all but the state grows with the rows,
  which underestimates what fits if there are few.
  """
  distance = lambda n: abs(known[n].needed_bytes - capacity)
  nearest = sorted(known, key=distance)
  x1 = nearest[0]
  y1 = known[x1].needed_bytes
  if len(nearest) == 1:
    state = ('base', 'adapter', 'optimizer')
    x2, y2 = 0, sum(known[x1].part_bytes[name] for name in state)
  else:
    x2, y2 = nearest[1], known[nearest[1]].needed_bytes
  slope = max((y2 - y1) / (x2 - x1), 1)
  guess = int(x1 + (capacity - y1) / slope)
  return min(max(guess, low + 1), high - 1)


def _rows_per_part(config: TrainConfig, mesh) -> int:
  """Rows of an update when each device computes one at a time."""
  parts = math.prod(mesh.shape[axis] for axis in sharding.BATCH)
  return parts * config.optimizer.accumulate_steps


def _rows_per_device(config: TrainConfig, mesh) -> int:
  return config.data.global_batch_size // _rows_per_part(config, mesh)


def _with_rows(config: TrainConfig, rows: int) -> TrainConfig:
  data = dataclasses.replace(config.data, global_batch_size=rows)
  return dataclasses.replace(config, data=data).resolve()


def _device_bytes(tree: Any) -> int:
  """Bytes of one device's shards of abstract arrays."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for _, x in pytree.items(tree)
  )


def _needed_bytes(message: str) -> int | None:
  """'... (19.02G) exceeds available HBM (15.75G)' → 19.02 GiB in bytes."""
  if 'RESOURCE_EXHAUSTED' not in message:
    return None
  match = re.search(r'([\d.]+)([KMGT])\)? (?:exceeds available HBM|of [\d.]+[KMGT] hbm)', message)
  return int(float(match[1]) * _UNITS[match[2]]) if match else None
