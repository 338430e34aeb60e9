"""How an adapter's factors act on a product with a kernel.

A projection's equation and kernel letters (`layout`) say what its factors are.
For the queries, `BTD,NDH->BTNH`:

    matrix   A [D, R]     B [R, N, H]    the paper's and PEFT's, rank <= r
    keras    A [N, D, R]  B [R, H]       Keras's EinsumDense, rank <= N r
"""

import functools

import jax
import jax.numpy as jnp


def factor_axes(equation: str, factorization: str) -> tuple[str, str]:
  """Axis letters of A and B, R being the rank.

  >>> factor_axes('BTD,NDH->BTNH', 'matrix')
  ('DR', 'RNH')
  >>> factor_axes('BTD,NDH->BTNH', 'keras')
  ('NDR', 'RH')
  """
  if factorization == 'keras':
    _, w, _ = split(equation)
    return w[:-1] + 'R', 'R' + w[-1]
  return inputs(equation) + 'R', 'R' + outputs(equation)


def apply(
  equation: str,
  x: jax.Array,
  lora_a: jax.Array,
  lora_b: jax.Array,
  plain_gradients: bool = False,
) -> jax.Array:
  """x A B, by two products through the rank; the scale is already in B.

  Args:
    equation: of the projection, e.g. 'BTD,NDH->BTNH'.
    x: the projection's input, e.g. [B, T, D].
    lora_a: A; its number of axes tells the factorization.
    lora_b: B.
    plain_gradients: leave B's gradient to JAX, for `jax.jvp` and second
      derivatives; otherwise use the one of `_widen`.

  Returns:
    The update to the projection's output, e.g. [B, T, N, H], in x's dtype.
  """
  x_axes, _, out = split(equation)
  a, b = axes_of(equation, lora_a.ndim)
  mid = ''.join(c for c in out if c in x_axes + a) + 'R'
  x = jnp.einsum(f'{x_axes},{a}->{mid}', x, lora_a.astype(x.dtype))
  lora_b = lora_b.astype(x.dtype)
  if plain_gradients:
    return jnp.einsum(f'{mid},{b}->{out}', x, lora_b)
  return _widen(mid, b, out, x, lora_b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _widen(mid, b, out, x, lora_b):
  """einsum(x, B) with a gradient of B that copies no wide cotangent.

  Args:
    mid: axis letters of x = input times A, which end in R.
    b: those of B.
    out: those of the projection's output.
    x: input times A, e.g. [B, T, R].
    lora_b: B, e.g. [R, N, H].

  JAX's own gradient of B puts the wide cotangent before x, and XLA's CPU backend
  then makes a transposed copy of it (3 % of a step of the 270M with 4 x 256
  tokens); with x first it does not.
  """
  return jnp.einsum(f'{mid},{b}->{out}', x, lora_b)


def _widen_forward(mid, b, out, x, lora_b):
  return _widen(mid, b, out, x, lora_b), (x, lora_b)


def _widen_backward(mid, b, out, operands, cotangent):
  x, lora_b = operands
  d_x = jnp.einsum(f'{out},{b}->{mid}', cotangent, lora_b)
  return d_x, jnp.einsum(f'{mid},{out}->{b}', x, cotangent)


_widen.defvjp(_widen_forward, _widen_backward)


def split(equation: str) -> tuple[str, str, str]:
  inputs, out = equation.split('->')
  x, w = inputs.split(',')
  return x, w, out


def inputs(equation: str) -> str:
  """Axes of the kernel that the projection sums over, e.g. 'D'."""
  x, w, out = split(equation)
  return ''.join(c for c in w if c in x and c not in out)


def outputs(equation: str) -> str:
  """The other axes of the kernel, e.g. 'NH'."""
  return ''.join(c for c in split(equation)[1] if c not in inputs(equation))


def axes_of(equation: str, num_axes: int) -> tuple[str, str]:
  """`factor_axes` of the factorization whose A has this number of axes."""
  a, b = factor_axes(equation, 'matrix')
  return (a, b) if len(a) == num_axes else factor_axes(equation, 'keras')
