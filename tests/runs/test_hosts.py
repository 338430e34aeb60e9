"""A single process agrees with itself; `test_multihost` has several."""

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from gemma_jax.config.train import MeshConfig
from gemma_jax.runs import hosts
from gemma_jax.training import sharding


def test_alone_nothing_is_asked_or_written(tmp_path):
  assert hosts.is_lead()
  question = lambda: True
  assert hosts.any_of_them(question) is question
  hosts.check_agreement('config', {'seed': 3})
  hosts.check_shared(str(tmp_path / 'run'))
  hosts.wait_for_all('here')
  assert not list(tmp_path.iterdir())


def test_arrays_of_any_sharding_come_whole():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  whole = np.arange(8 * 6).reshape(8, 6)
  specs = {'a': (), 'b': ('fsdp', 'tensor'), 'c': (('data', 'fsdp'),)}
  tree = {
    name: jax.device_put(whole, NamedSharding(mesh, PartitionSpec(*spec)))
    for name, spec in specs.items()
  }
  got = hosts.to_numpy(tree)
  assert got.keys() == tree.keys()
  for name, x in got.items():
    assert isinstance(x, np.ndarray), name
    np.testing.assert_array_equal(x, whole, err_msg=name)
