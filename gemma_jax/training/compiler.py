"""Options and remat of a compiled step, and whether it fits in memory."""

from collections.abc import Callable
import os
from typing import Any

from absl import logging
import jax
from jax.sharding import Mesh

from gemma_jax.model.transformer import Transformer

# Keeps bfloat16 weights bfloat16 on a CPU: each layer's are widened where they
# are used, and XLA would hoist that out of the loops over layers and tokens, to
# hold a float32 copy of the whole base.
_CPU_OPTIONS = {'xla_disable_hlo_passes': 'while-loop-invariant-code-motion'}

# What `auto` tries, in this order. Not `none`, which keeps all activations: on
# a CPU it was no faster than `dots` and took three times the temporaries
# (0.94 against 0.35 GiB for 512 tokens of the 270M; `full` 0.09).
_AUTO_REMAT = ('dots', 'full')

# The share of a host's memory that a step may take: Python, its libraries and
# the files being read need some too. An accelerator's limit already allows for
# its own needs.
_HOST_SHARE = 0.85


def options(platform: str) -> dict[str, str] | None:
  """`compiler_options` of `jax.jit` for a platform such as 'cpu'."""
  return _CPU_OPTIONS if platform == 'cpu' else None


class ByShape:
  """A step that compiles a program for each form of batch it meets."""

  def __init__(self, compile_for: Callable[[Any], jax.stages.Compiled]):
    """Compiles nothing yet.

    Args:
      compile_for: compiles the program for a batch, or for the shapes of one.
    """
    self._compile_for = compile_for
    self._programs: dict[Any, jax.stages.Compiled] = {}

  def program(self, batch: Any) -> jax.stages.Compiled:
    """The program for batches like this one; compiled if it is new."""
    leaves, structure = jax.tree.flatten(batch)
    form = structure, tuple((x.shape, x.dtype) for x in leaves)
    if form not in self._programs:
      self._programs[form] = self._compile_for(batch)
    return self._programs[form]

  def __call__(self, *arguments: Any) -> Any:
    """Runs the step; its last argument is the batch."""
    return self.program(arguments[-1])(*arguments)


def with_remat(
  model: Transformer,
  remat: str,
  mesh: Mesh,
  compile_with: Callable[[Transformer], jax.stages.Compiled],
) -> jax.stages.Compiled:
  """The training step under a remat policy; auto takes the first that fits.

  The choice compares the compiler's own account of the step's memory with all
  of a device's memory, used or not, so that a resumed run computes as the first
  one did.

  Args:
    model: the transformer; its own policy is ignored.
    remat: auto, or a policy of `Transformer.remat`.
    mesh: where the step runs.
    compile_with: compiles the step with a given model.
  """
  candidates = _AUTO_REMAT if remat == 'auto' else (remat,)
  limit = memory_limit_bytes(mesh)
  for policy in candidates[:-1]:
    try:
      compiled = compile_with(model.clone(remat=policy))
    except jax.errors.JaxRuntimeError as e:  # a TPU's compiler knows its limit
      if 'RESOURCE_EXHAUSTED' not in str(e):
        raise
      needed = 'more than the device has'
    else:
      needed = memory_bytes(compiled)
      if limit is None or needed <= limit:
        logging.info('remat: %s', policy)
        return compiled
    logging.info('remat: %s needs %s bytes of %s', policy, needed, limit)
  return compile_with(model.clone(remat=candidates[-1]))


def memory_analysis(compiled: jax.stages.Compiled) -> Any:
  """The compiler's account of a program's memory, per device: XLA's `CompiledMemoryStats`."""
  analysis = compiled.memory_analysis()
  assert analysis is not None  # XLA has one on CPU, GPU and TPU
  return analysis


def memory_bytes(compiled: jax.stages.Compiled) -> int:
  """Arguments, temporaries and new outputs of a program, per device."""
  analysis = memory_analysis(compiled)
  return (
    analysis.argument_size_in_bytes
    + analysis.temp_size_in_bytes
    + analysis.output_size_in_bytes
    - analysis.alias_size_in_bytes
  )


def memory_limit_bytes(mesh: Mesh) -> int | None:
  """What a device of the mesh may hold; None if unknown."""
  device = mesh.devices.flat[0]
  if device.platform == 'cpu':
    total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return int(_HOST_SHARE * total) // len(mesh.local_devices)
  try:
    return (device.memory_stats() or {}).get('bytes_limit')
  except jax.errors.JaxRuntimeError:  # a device of a described topology
    return None
