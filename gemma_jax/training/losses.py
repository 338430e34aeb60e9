"""Cross-entropy: hidden states and embedding in, losses out, no logits.

With V = 256k the logits [B, T, V] of one 512-token row are half a gigabyte, and
response-only training needs most of them for nothing. `vocabulary_walk` makes
the losses of the supervised positions, and each one's gradient with it, from a
few logits at a time.

Each gradient belongs to one position, so the backward pass only multiplies it by
the position's cotangent, whatever function of the losses is differentiated. The
embedding's gradient is a sum over positions: a second walk, made only if needed.

On a mesh each device walks its own positions (rows over some axes) and its own
part of the vocabulary (over the others). Devices with more supervised positions
walk longer, and none waits inside the walk: m, s and g are combined after it. A
device needs all D columns of its rows of the embedding: what `fsdp` has divided
is gathered for the walk, V / tensor x D values at once (1 GB in bfloat16 for 256k
rows of 2048).
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gemma_jax.model import layers
from gemma_jax.training import vocabulary_walk as walk


def token_cross_entropy(
  hidden: jax.Array,
  embedding: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  softcap: float | None = None,
  num_pieces: int | None = None,
  sharding: NamedSharding | None = None,
  chunk: walk.Chunk | None = None,
  plain_gradients: bool = False,
) -> jax.Array:
  """Each supervised position's next-token loss; build any loss on it.

      total = jnp.sum(token_cross_entropy(hidden, embedding, targets, weights))

  Differentiable once, in reverse, with any cotangents [B, T]: in `hidden` and,
  if it is being differentiated, in `embedding`; a frozen embedding costs
  nothing, a trained one a second walk. `weights` count as constants, and where
  they are 0 there is no gradient, whatever the cotangent. A loss whose
  coefficients depend on parameters takes a mask of zeros and ones here and
  multiplies the result.

  Args:
    hidden: [B, T, D], after the final norm.
    embedding: [V, D], tied.
    targets: int32 [B, T].
    weights: float32 [B, T]; positions of weight 0 are never computed.
    softcap: the logits' soft cap, or None.
    num_pieces: rows of the embedding that are tokens; later rows are masked,
      and the loss of a target among them is infinite.
    sharding: `hidden`'s; mesh axes that do not split its rows split the
      vocabulary. None: one device.
    chunk: positions and rows at a time, see `vocabulary_walk.Chunk`; None
      chooses by the platform.
    plain_gradients: compute all logits [B, T, V] and leave the gradient to JAX:
      for small models only, but `jax.jvp` and second derivatives work.

  Returns:
    float32 [B, T], weight times nats; 0 where the weight is 0. Their sum
    divided by the sum of the weights is the loss per token.
  """
  options = walk.Options(softcap, num_pieces, sharding, chunk)
  losses = _plain_losses if plain_gradients else _token_losses
  return losses(options, hidden, embedding, targets, jax.lax.stop_gradient(weights))


def _plain_losses(options, hidden, embedding, targets, weights):
  """The reference: `_token_losses` from all logits at once."""
  is_supervised = weights != 0
  hidden = jnp.where(is_supervised[..., None], hidden, 0)
  embedding = embedding.astype(hidden.dtype)
  logits = jnp.einsum('BTD,VD->BTV', hidden, embedding, preferred_element_type=jnp.float32)
  logits = layers.softcap(logits, options.softcap)
  logits = logits[..., : options.num_pieces]
  target_logits = jnp.take_along_axis(
    logits, targets[..., None], axis=-1, mode='fill', fill_value=-jnp.inf
  )
  nats = jax.nn.logsumexp(logits, axis=-1) - target_logits[..., 0]
  return jnp.where(is_supervised, weights * nats, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_losses(options, hidden, embedding, targets, weights):
  arrays = hidden, embedding, targets, weights
  return _on_mesh(walk.losses_on_device, options, ('losses',), *arrays)['losses']


def _token_losses_forward(options, hidden, embedding, targets, weights):
  """Losses and what the backward pass scales; the embedding's part on demand."""
  arrays = [x.value for x in (hidden, embedding, targets, weights)]
  wanted = ('losses', 'd_hidden')
  if embedding.perturbed:
    wanted += ('logsumexp', 'slope')
  results = _on_mesh(walk.losses_on_device, options, wanted, *arrays)
  second_walk = None
  if embedding.perturbed:
    second_walk = (*arrays[:3], results['logsumexp'], results['slope'])
  return results['losses'], (arrays[3], results['d_hidden'], second_walk)


def _token_losses_backward(options, residuals, cotangent):
  weights, d_hidden, second_walk = residuals
  # 0 times infinity would be NaN, not 0. (The cotangents of a sum are a constant
  # 1; the compiler then drops this.)
  is_needed = (weights != 0) | jnp.isfinite(cotangent)
  scale = jnp.where(is_needed, cotangent, 0.0)[..., None]
  d_hidden = (scale * d_hidden.astype(jnp.float32)).astype(d_hidden.dtype)
  d_embedding = None
  if second_walk is not None:
    hidden, embedding, targets, *statistics = second_walk
    d_embedding = _on_mesh(
      walk.embedding_gradient_on_device,
      options,
      ('d_embedding',),
      *(hidden, embedding, targets, weights, cotangent, *statistics),
    )['d_embedding']
  return d_hidden, d_embedding, None, None


_token_losses.defvjp(_token_losses_forward, _token_losses_backward, symbolic_zeros=True)


def _on_mesh(
  on_device: Callable[..., dict[str, jax.Array]],
  options: walk.Options,
  wanted: tuple[str, ...],
  *arrays: jax.Array,
) -> dict[str, jax.Array]:
  """Runs `on_device` on every device of the mesh and puts the results together.

  Args:
    on_device: a function of `vocabulary_walk`.
    options: static.
    wanted: names of results.
    *arrays: its arguments; the second, the embedding, is divided over the
      vocabulary, the others over rows.
  """
  embedding = arrays[1]
  if options.num_pieces is not None and options.num_pieces >= len(embedding):
    options = options._replace(num_pieces=None)
  if options.sharding is None or options.sharding.mesh.size == 1:
    return on_device(options, wanted, (), (), *arrays)
  mesh, rows = options.sharding.mesh, options.sharding.spec[0]
  rows = (rows,) if isinstance(rows, str) else tuple(rows)
  columns = tuple(axis for axis in mesh.axis_names if axis not in rows)
  by_row, by_column = PartitionSpec(rows), PartitionSpec(columns)
  return jax.shard_map(
    functools.partial(on_device, options, wanted, rows, columns),
    mesh=mesh,
    in_specs=(by_row, by_column, *[by_row] * len(arrays[2:])),
    out_specs={name: by_column if name == 'd_embedding' else by_row for name in wanted},
    check_vma=False,  # the loops' states start equal and diverge
  )(*arrays)
