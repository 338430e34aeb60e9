"""What a training step must compute and move, in closed form, and a lower bound
of the time that takes.

XLA's own count is of no use here: it counts the body of a scan once, and it
cannot look into a kernel. The closed form, for B T tokens per step:

    product x W, W [in, out]    2 in out flops per token; the same again for the
                                gradient to x, and again for that to W if it is
                                trained (factors are, the base mostly is not)
    attention                   4 N H flops per visible (query, key) pair, twice
                                that for the gradients
    loss                        2 D V flops per position, again for its gradient

Each resource bounds the step from below as if the others cost nothing, so the
largest of the three times is optimistic: only a program that overlaps everything
and wastes nothing reaches it.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from jax.sharding import Mesh

from gemma_jax import pytree
from gemma_jax.config.train import TrainConfig
from gemma_jax.lora import factors as factors_lib
from gemma_jax.model import adapter, layout
from gemma_jax.model.config import ModelConfig
from gemma_jax.tpu.chips import Chip
from gemma_jax.tpu.hlo import Collective
from gemma_jax.training import sharding, vocabulary_walk


@dataclasses.dataclass(frozen=True)
class Work:
  """A step's work.

  Rows count as full, of one document each, with every position in the loss: an
  upper bound of what packed or padded rows of answers cost.

  Attributes:
    model_flops: FLOPs that loss and gradients need, over all devices.
    executed_flops: those and what is recomputed to save memory.
    hbm_bytes: lower bound of traffic to and from each device's memory: every
      product reads its operands and writes its result.
  """

  model_flops: float
  executed_flops: float
  hbm_bytes: float


@dataclasses.dataclass(frozen=True)
class Bound:
  """Least times of a step, in seconds.

  Attributes:
    compute_secs: at the chip's peak.
    hbm_secs: at its memory bandwidth.
    interconnect_secs: at the bandwidth of its links.
    tokens: of a step, over all devices.
    mfu: model FLOPs over what the devices could do in `secs`; no run of this
      program reaches a higher model FLOPs utilization.
  """

  compute_secs: float
  hbm_secs: float
  interconnect_secs: float
  tokens: int
  mfu: float

  @property
  def secs(self) -> float:
    """Of the whole step, at least."""
    return max(self.compute_secs, self.hbm_secs, self.interconnect_secs)

  @property
  def tokens_per_sec(self) -> float:
    """At most, over all devices."""
    return self.tokens / self.secs

  @property
  def bound_by(self) -> str:
    """The limiting resource."""
    times = {
      'compute': self.compute_secs,
      'HBM': self.hbm_secs,
      'interconnect': self.interconnect_secs,
    }
    return max(times, key=lambda name: times[name])


def training_step(
  config: TrainConfig, model_config: ModelConfig, mesh: Mesh, dtype: Any, members: int = 1
) -> Work:
  """The work of one update.

  Args:
    config: resolved; gives rows, adapter, trainable leaves and remat.
    model_config: architecture.
    mesh: gives the split of rows and kernels.
    dtype: of the activations, in which kernels are read.
    members: batched adapters, each with its own activations; a kernel is read
      once for all of them.
  """
  sizes = {**layout.axis_sizes(model_config), 'R': config.lora.rank}
  rows = members * config.data.global_batch_size
  tokens = rows * config.data.seq_len
  layers = model_config.num_layers
  trained = _trained_params(config, model_config)
  kernels = layers * sum(
    _product_flops(equation.split(',')[1].split('->')[0], sizes)
    for equation in layout.PROJECTION_EQUATIONS.values()
  )
  factors = layers * sum(
    _factor_flops(equation, config.lora.factorization, sizes)
    for equation in factors_lib.target_paths(config.lora).values()
  )
  attention = (
    4
    * model_config.num_heads
    * model_config.head_dim
    * rows
    * sum(
      visible_pairs(config.data.seq_len, model_config.window_size if is_local else None)
      for is_local in model_config.layer_is_local or (False,) * layers
    )
  )
  loss = 2 * model_config.embed_dim * model_config.vocab_size
  forward = tokens * (kernels + factors) + attention
  model_flops = tokens * (2 * kernels + 3 * factors + 2 * loss + 2 * trained) + 3 * attention
  again = forward if _recomputes(config) else 0
  # A flash kernel keeps no scores: its backward pass recomputes them, once for the
  # queries' gradient and once for the keys', with the products that feed the
  # softmax: 7 products of T x S x H instead of 4.
  again += attention * 3 / 2
  return Work(
    model_flops=model_flops,
    executed_flops=model_flops + again,
    hbm_bytes=_hbm_bytes(config, model_config, mesh, dtype.itemsize, tokens),
  )


def visible_pairs(length: int, window: int | None) -> int:
  """(query, key) pairs of one causal row: min(t + 1, window) keys for query t.

  visible_pairs(4, None)    10
  visible_pairs(4, 2)       7
  """
  window = length if window is None else min(window, length)
  return window * (window + 1) // 2 + (length - window) * window


def bound(
  work: Work, collectives: Sequence[Collective], chip: Chip, mesh: Mesh, tokens: int
) -> Bound:
  """Least times on a chip.

  Args:
    work: of a step.
    collectives: of the compiled step.
    chip: each device's.
    mesh: devices, with the slice of each.
    tokens: of a step, over all devices.
  """
  slices = [getattr(d, 'slice_index', 0) or 0 for d in mesh.devices.flat]
  crossing = [c for c in collectives if c.crosses(slices)]
  within = [c for c in collectives if not c.crosses(slices)]
  # Both networks work at the same time.
  interconnect_secs = _sent(within) / chip.ici_bytes_per_sec
  if crossing:
    assert chip.dcn_bytes_per_sec is not None  # else `topology.parse` refuses slices
    interconnect_secs = max(interconnect_secs, _sent(crossing) / chip.dcn_bytes_per_sec)
  compute_secs = work.executed_flops / (mesh.size * chip.peak_flops)
  hbm_secs = work.hbm_bytes / chip.hbm_bytes_per_sec
  secs = max(compute_secs, hbm_secs, interconnect_secs)
  return Bound(
    compute_secs=compute_secs,
    hbm_secs=hbm_secs,
    interconnect_secs=interconnect_secs,
    tokens=tokens,
    mfu=work.model_flops / (secs * mesh.size * chip.peak_flops),
  )


def _sent(collectives: Sequence[Collective]) -> float:
  return sum(c.sent_bytes for c in collectives)


def _recomputes(config: TrainConfig) -> bool:
  """Whether the backward pass computes each layer a second time."""
  return config.model.remat == 'full'


def _product_flops(letters: str, sizes: dict[str, int]) -> int:
  """Two FLOPs for each element of the kernel, per token."""
  return 2 * math.prod(sizes[c] for c in letters)


def _factor_flops(equation: str, form: str, sizes: dict[str, int]) -> int:
  """x A, then B, per token; shared axes of the two products count in both."""
  a, b = adapter.factor_axes(equation, form)
  x, out = equation.split(',')[0], equation.split('->')[1]
  mid = {c for c in out if c in x + a} | {'R'}
  first, second = ({*x, *a}, {*mid, *b})
  return sum(_product_flops(''.join(letters - {'B', 'T'}), sizes) for letters in (first, second))


def _trained_params(config: TrainConfig, model_config: ModelConfig) -> int:
  """Elements of the base's kernels that are trained."""
  abstract = {'params': layout.abstract_params(model_config)}
  mask = pytree.mask(abstract, config.trainable)
  return sum(
    math.prod(leaf.shape)
    for (name, leaf), (_, is_trained) in zip(
      pytree.items(abstract), pytree.items(mask), strict=True
    )
    if is_trained and not name.endswith('/scale')
  )


def _hbm_bytes(config, model_config, mesh, itemsize, tokens) -> float:
  """Bytes per device: operands and results of each product, in each pass."""
  sizes = {
    letter: size / (mesh.shape['tensor'] if _splits(letter, size, mesh) else 1)
    for letter, size in layout.axis_sizes(model_config).items()
  }
  size = lambda letters: math.prod(sizes[c] for c in letters if c not in 'BT')
  tokens = tokens / math.prod(mesh.shape[axis] for axis in sharding.BATCH)
  parts = config.optimizer.accumulate_steps  # each reads all kernels
  passes = 3 if _recomputes(config) else 2
  elements = 0.0
  for equation in layout.PROJECTION_EQUATIONS.values():
    operands, result = equation.split('->')
    x, w = operands.split(',')
    elements += passes * (parts * size(w) + tokens * (size(x) + size(result)))
  elements *= sizes['L']
  # The loss goes through the embedding once, tile by tile, and each tile reads the
  # hidden states and reads and writes their float32 gradient.
  tiles = -(-sizes['V'] // vocabulary_walk.ACCELERATOR_CHUNK[1])
  elements += parts * size('VD')
  elements += tokens * sizes['D'] * tiles * (1 + 2 * 4 / itemsize)
  return elements * itemsize


def _splits(letter: str, size: int, mesh: Mesh) -> bool:
  """Whether activations of this axis are split over `tensor`."""
  is_tensor = sharding.RULES.axis(letter) == 'tensor'
  return is_tensor and size % mesh.shape['tensor'] == 0
