"""Which implementation computes attention: chosen once, for a model on a mesh."""

from typing import Any

from absl import logging
from jax.sharding import Mesh

from gemma_jax.model import attention, blocks, cudnn, splash
from gemma_jax.model.config import ModelConfig

_BY_PLATFORM = {'tpu': 'splash', 'gpu': 'cudnn', 'cpu': 'blocks'}

_EVERYWHERE = {'einsum': attention.attend_by_einsum, 'blocks': blocks.attend}


def choose(
  name: str,
  config: ModelConfig,
  dtype: Any,
  mesh: Mesh,
  batch_axes: tuple[str, ...],
  head_axis: str,
) -> attention.Attend:
  """The attention that `model.attention` names.

  `auto` follows the platform of the mesh, which need not be this machine's: a
  program can be compiled for a TPU anywhere. If a kernel cannot compute a model,
  `auto` falls back to einsum and logs why.

  Args:
    name: auto, einsum, blocks, splash or cudnn.
    config: architecture.
    dtype: of the activations.
    mesh: where it will run.
    batch_axes: mesh axes that the rows are split over.
    head_axis: mesh axis that the heads are split over.

  Raises:
    ValueError: a kernel asked for by name cannot compute this model here.
  """
  device = mesh.devices.flat[0]
  choice = _BY_PLATFORM[device.platform] if name == 'auto' else name
  if choice in _EVERYWHERE:
    return _EVERYWHERE[choice]
  if choice == 'cudnn':
    attend, unsupported_reason = cudnn.attend, cudnn.unsupported_reason(config, dtype, device)
  else:
    interpret = device.platform == 'cpu'
    attend = splash.Splash(mesh, batch_axes, head_axis, interpret)
    unsupported_reason = splash.unsupported_reason(dtype, device)
  if unsupported_reason is None:
    return attend
  if name == 'auto':
    logging.info('Attention by einsum; %s: %s.', choice, unsupported_reason)
    return attention.attend_by_einsum
  raise ValueError(
    f'model.attention: got {name!r}, but {unsupported_reason}; expected auto, or '
    f'{" or ".join(_EVERYWHERE)}, which run everywhere.'
  )
