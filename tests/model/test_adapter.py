"""How factors act on a product, and what gradients they have."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.model import adapter, layout
from tests import toy

pytestmark = [
  pytest.mark.usefixtures('strict', 'quick_compile'),
  pytest.mark.filterwarnings('error'),
]

R = 3
FACTORIZATIONS = ('matrix', 'keras')


def axes_of(equation):
  """'BTD,NDH->BTNH' → ('BTD', 'NDH', 'BTNH')."""
  return re.fullmatch(r'(\w+),(\w+)->(\w+)', equation).groups()


@pytest.mark.parametrize('factorization', FACTORIZATIONS)
@pytest.mark.parametrize('path', layout.PROJECTION_EQUATIONS)
def test_apply_equals_float64_einsum(path, factorization):
  equation = layout.PROJECTION_EQUATIONS[path]
  x_axes, w_axes, _ = axes_of(equation)
  a_axes, b_axes = adapter.factor_axes(equation, factorization)
  sizes = layout.axis_sizes(toy.FULL) | {'B': 2, 'T': 7, 'R': R}
  rng = np.random.default_rng(0)
  x, a, b = (rng.standard_normal([sizes[c] for c in axes]) for axes in (x_axes, a_axes, b_axes))
  update = np.einsum(f'{a_axes},{b_axes}->{w_axes}', a, b)
  got = adapter.apply(equation, *(jnp.asarray(y, jnp.float32) for y in (x, a, b)))
  toy.assert_close(got, np.einsum(equation, x, update), 1e-5)


plain_apply = functools.partial(adapter.apply, plain_gradients=True)


def one_einsum(equation, x, a, b):
  """`adapter.apply` without the product of the rank between."""
  x_axes, _, out = axes_of(equation)
  a_axes, b_axes = adapter.axes_of(equation, a.ndim)
  return jnp.einsum(f'{x_axes},{a_axes},{b_axes}->{out}', x, a, b)


@pytest.mark.parametrize('factorization', FACTORIZATIONS)
@pytest.mark.parametrize('path', layout.PROJECTION_EQUATIONS)
def test_gradients_of_apply_equal_those_of_one_einsum(path, factorization):
  """Also for adapters mapped over one input, and over an input for each."""
  equation = layout.PROJECTION_EQUATIONS[path]
  x_axes, _, _ = axes_of(equation)
  a_axes, b_axes = adapter.factor_axes(equation, factorization)
  sizes = layout.axis_sizes(toy.FULL) | {'B': 2, 'T': 7, 'R': R}
  rng = np.random.default_rng(1)

  def draw(axes, summed):  # so that outputs are of order one
    scale = math.prod(sizes[c] for c in summed) ** -0.5
    values = rng.standard_normal([3, *(sizes[c] for c in axes)])
    return jnp.asarray(scale * values, jnp.float32)

  x = draw(x_axes, '')
  a, b = draw(a_axes, set(a_axes) & set(x_axes)), draw(b_axes, 'R')
  one = x[0], a[0], b[0]

  def gradients(function, mapped, arrays):
    function = functools.partial(function, equation)
    if mapped:
      function = jax.vmap(function, mapped)
    total = lambda *arrays: jnp.sum(jnp.sin(function(*arrays)))
    found = jax.jit(jax.grad(total, (0, 1, 2)))(*arrays)
    return dict(zip('xab', found, strict=True))

  for mapped, arrays in ((None, one), ((None, 0, 0), (x[0], a, b)), ((0, 0, 0), (x, a, b))):
    want = gradients(one_einsum, mapped, arrays)
    toy.assert_close(gradients(adapter.apply, mapped, arrays), want, 1e-5)
    toy.assert_close(gradients(plain_apply, mapped, arrays), want, 1e-5)

  half = [y.astype(jnp.bfloat16) for y in one]
  want = gradients(one_einsum, None, [y.astype(jnp.float32) for y in half])
  got = gradients(adapter.apply, None, half)
  for name, y in got.items():
    assert y.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(y, np.float32) - want[name])
    assert error <= 0.02 * np.linalg.norm(want[name]), name


def test_the_gradient_of_b_copies_no_cotangent():
  """JAX's own does: it would be moved for its tokens to come first."""
  x, a, b = jnp.ones((4, 256, 64)), jnp.ones((64, R)), jnp.ones((R, 4, 256))
  shape = (4, 256, 4, 256)

  def largest_copy(apply):
    def gradient(b, cotangent):
      return jax.vjp(lambda b: apply('BTD,NDH->BTNH', x, a, b), b)[1](cotangent)

    program = jax.jit(gradient).lower(b, jnp.ones(shape)).compile().as_text()
    copies = re.findall(r'\[([\d,]+)\]\S* copy\(', program)
    return max(math.prod(map(int, copy.split(','))) for copy in copies)

  assert largest_copy(plain_apply) == math.prod(shape)
  assert largest_copy(adapter.apply) < math.prod(shape)
