"""The forward pass straight from a checkpoint, one layer in memory at a time.

Slower than a loaded model, but a model of any size fits: it needs the largest
layer in float32 and a few megabytes. Meant for checks, which run a pass once.
"""

from concurrent import futures
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax import pytree
from gemma_jax.formats import base_source
from gemma_jax.formats.base_source import BaseSource
from gemma_jax.lora import factors
from gemma_jax.lora.lora import Lora
from gemma_jax.model import layout
from gemma_jax.model.layers import RMSNorm, softcap
from gemma_jax.model.transformer import Layer, Transformer


def logits(source: BaseSource, tokens: np.ndarray, lora: Lora | None = None) -> np.ndarray:
  """Logits of a base, with or without an adapter, computed in float32.

  Args:
    source: any base; its weights are read once, in order.
    tokens: int32 [B, T], without padding.
    lora: an adapter, scanned, or None. Leaves of the base that were trained with
      it are up to the source (`merged.merge`).

  Returns:
    float32 [B, T, V].
  """
  config = source.config
  own = {} if lora is None else layout.unstack_layers(lora.factors)
  pattern = config.layer_is_local or (False,) * config.num_layers
  context = Transformer(config).apply(
    {},
    jnp.ones_like(tokens),
    jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
    None,
    method='_context',
  )
  embedding = source.tensors['embedder/input_embedding']

  @functools.partial(jax.jit, static_argnames='is_local')
  def run_layer(variables, x, is_local):
    (x, _), _ = Layer(config).apply(variables, (x, None), is_local, 0, context)
    return x

  @jax.jit
  def decode(x, rows):
    products = jnp.einsum('BTD,VD->BTV', x, rows.astype(jnp.float32))
    return softcap(products, config.final_softcap)

  with futures.ThreadPoolExecutor(2) as pool, jax.default_matmul_precision('highest'):
    x = np.stack([embedding.read(i, i + 1)[0] for i in tokens.ravel()])
    x = x.astype(np.float32).reshape(*tokens.shape, -1)
    x *= np.sqrt(np.float32(config.embed_dim))
    for i, is_local in enumerate(pattern):
      params = _read(source, f'layer_{i}/', pool)
      variables = {'params': params}
      if lora is not None and f'layer_{i}' in own:
        variables = factors.variables(params, own[f'layer_{i}'], lora.scale)
      x = run_layer(variables, x, is_local).block_until_ready()
    scale = _read(source, 'final_norm/', pool)
    x = RMSNorm(config.norm_eps).apply({'params': scale}, x)
    chunks = []
    rows = 2 * base_source.chunk_rows(embedding.shape)
    for start in range(0, config.vocab_size, rows):
      stop = min(start + rows, config.vocab_size)
      chunks.append(np.asarray(decode(x, embedding.read(start, stop))))
  return np.concatenate(chunks, axis=-1)


def _read(source: BaseSource, prefix: str, pool: futures.Executor) -> pytree.Tree:
  """The leaves under a path, in float32."""
  abstract = layout.abstract_params(source.config, np.float32, False)
  leaves = {}
  for path, leaf in pytree.items(abstract):
    if path.startswith(prefix):
      out = np.empty(leaf.shape, np.float32)
      source.read_into(path, out, pool)
      leaves[path.removeprefix(prefix)] = out
  return pytree.unflatten(leaves)
