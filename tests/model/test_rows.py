"""Products with rows: equal to those with kernels; what rounding costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.model import layout
from gemma_jax.model import rows as rows_lib
from gemma_jax.model.rows import MAX_SUMMED_BATCH, Rows
from gemma_jax.sampling import weights
from tests import toy

pytestmark = [
  pytest.mark.usefixtures('strict', 'quick_compile'),
  pytest.mark.filterwarnings('error'),
]

SIZES = {'T': 1, 'V': 53, **dict(zip('DNHKF', (37, 5, 6, 3, 41), strict=True))}
EQUATIONS = ['BTD,VD->BTV', *layout.PROJECTION_EQUATIONS.values()]


def draw(letters, seed, **sizes):
  rng = np.random.default_rng(seed)
  shape = [{**SIZES, **sizes}[c] for c in letters]
  return rng.standard_normal(shape, np.float32)


@pytest.mark.parametrize('equation', EQUATIONS)
def test_the_axes_of_a_product(equation):
  """A token a row or several, few rows or many: always einsum's result."""
  x_axes, w_axes = equation.split('->')[0].split(',')
  kernel = draw(w_axes, 1)
  order = [w_axes.index(c) for c in rows_lib.axes(equation)]
  rows = Rows(jnp.asarray(kernel.transpose(order)))
  product = jax.jit(lambda x: rows_lib.product(equation, x, rows))
  for B, T in ((1, 1), (3, 1), (MAX_SUMMED_BATCH + 1, 1), (2, 7)):
    x = draw(x_axes, 2, B=B, T=T)
    want = np.einsum(equation, x.astype(np.float64), kernel)
    toy.assert_close(product(x), want, 1e-5)


@pytest.mark.parametrize('T', [1, 7])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_narrow_rows_multiply_as_their_values_do(dtype, T):
  x = draw('BTD', 1, B=3, T=T)
  values = jnp.asarray(draw('VD', 2)).astype(dtype)
  scale = jnp.asarray(draw('V', 3))
  y = rows_lib.product('BTD,VD->BTV', x, Rows(values, scale), jnp.float32)
  wide = np.asarray(values).astype(np.float64) * np.asarray(scale)[:, None]
  assert y.dtype == jnp.float32
  toy.assert_close(y, np.einsum('BTD,VD->BTV', x, wide), 1e-5)


def test_taken_rows_are_scaled():
  values, scale = draw('VD', 1), draw('V', 2)
  index = np.array([[3, 52, 3], [0, 1, 2]], np.int32)
  taken = rows_lib.take(Rows(values, scale), index, jnp.float32)
  toy.assert_close(taken, (values * scale[:, None])[index], 1e-6)


def test_quantized_rows_are_off_by_half_a_scale_at_most():
  values = draw('NHD', 1)
  values[2, 3] = 0.0
  rows = weights.quantize(jnp.asarray(values), 1)
  assert rows.values.dtype == jnp.int8
  got, scale = np.asarray(rows.values), np.asarray(rows.scale)
  assert scale.shape == values.shape[:2]
  error = np.abs(got * scale[:, :, None] - values)
  assert (error <= scale[:, :, None] * 0.5001).all()
  assert not got[2, 3].any()
  largest = np.abs(got).max(-1)
  assert (largest == 127).sum() == largest.size - 1
