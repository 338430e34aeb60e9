"""Products with weights whose summed axes come last: rows, one for each output.

    kernel [N, D, H] of the queries  →  rows [N, H, D]

Decoding is bound by the bytes of the weights. In this layout an output is the dot
product of the input with a contiguous row, whose values, stored as bfloat16 or
int8, are widened in registers as they arrive.
"""

from flax import struct
import jax
import jax.numpy as jnp

# Largest batch whose products are computed as sums on a CPU: more rows are bound
# by arithmetic, at which a matrix product is better.
MAX_SUMMED_BATCH = 16


@struct.dataclass
class Rows:
  """Weights, [outputs ..., summed axes ...].

  Attributes:
    values: float32, bfloat16 or int8.
    scale: float32 [outputs ...], multiplies each row; None is 1.
  """

  values: jax.Array
  scale: jax.Array | None = None


def axes(equation: str) -> str:
  """Axis letters of a kernel's rows.

  axes('BTD,NDH->BTNH')    'NHD'
  """
  operands, _ = equation.split('->')
  x, w = operands.split(',')
  return ''.join(sorted(w, key=lambda c: c in x))


def take(rows: Rows, index: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Rows [V, D] at index [B, T] → [B, T, D] in a dtype."""
  x = jnp.take(rows.values, index, axis=0).astype(dtype)
  if rows.scale is None:
    return x
  return x * jnp.take(rows.scale, index)[:, :, None].astype(dtype)


def product(
  equation: str, x: jax.Array, rows: Rows, dtype: jax.typing.DTypeLike | None = None
) -> jax.Array:
  """Computes einsum(equation, x, kernel) from the kernel's rows.

  For one token per row (T = 1) a matrix product would first write a widened copy
  of narrow weights, and XLA's CPU one is slow for a few rows even of float32. A
  multiplication and a sum are one loop there, which reads the weights once.

  Args:
    equation: of the kernel, 'BTD,NDH->BTNH': x has B, T and the summed axes, the
      result has B, T and the kernel's other axes.
    x: [B, T, ...].
    rows: weights of the kernel.
    dtype: of the result; default: x's.
  """
  dtype = dtype or x.dtype
  result = equation.split('->')[1]
  matrix = f'{equation.split(",")[0]},{axes(equation)}->{result}'

  def matrix_product(x, values):
    values = values.astype(x.dtype)
    return jnp.einsum(matrix, x, values, preferred_element_type=dtype)

  def sum_of_products(x, values):
    return _sum_of_products(x, values, len(result) - 2).astype(dtype)

  if x.shape[1] > 1 or x.shape[0] > MAX_SUMMED_BATCH:
    y = matrix_product(x, rows.values)
  else:
    y = jax.lax.platform_dependent(x, rows.values, cpu=sum_of_products, default=matrix_product)
  if rows.scale is not None:
    y *= rows.scale[None, None].astype(dtype)
  return y


def _sum_of_products(x, values, num_outputs):
  """x [B, 1, ...] times the rows; float32."""
  # [N, H, 1, D] times [1, 1, B, D] for the queries: only the summed axes come after
  # B, so that the whole batch shares a row while it is in cache.
  values = jnp.expand_dims(values, num_outputs)
  x = jnp.expand_dims(x[:, 0].astype(jnp.float32), range(num_outputs))
  # The computation of x must not be fused into the loop, which would repeat it for
  # every output.
  products = values.astype(jnp.float32) * jax.lax.optimization_barrier(x)
  y = jnp.sum(products, axis=range(num_outputs + 1, products.ndim))
  return jnp.moveaxis(y, -1, 0)[:, None]
