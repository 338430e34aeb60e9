"""Which adapter a path names is told by what is there."""

from pathlib import Path
import shutil

import numpy as np
import pytest

from gemma_jax import pytree
from gemma_jax.formats import adapter, open_base, peft
from tests.formats.test_keras import CONFIGS

GOLDEN = Path(__file__).parents[1] / 'golden'
GEMMA1 = GOLDEN / 'parity' / 'gemma1'


def test_a_peft_folder_reads_as_peft_reads_it():
  config = open_base.open_base(str(GEMMA1)).config
  lora_config, factors, trained = adapter.read_adapter(GEMMA1 / 'adapter_qv', config)
  want_config, want = peft.read_adapter(GEMMA1 / 'adapter_qv', config)
  assert lora_config == want_config
  assert trained == {}
  for (name, got), (_, x) in zip(pytree.items(factors), pytree.items(want), strict=True):
    np.testing.assert_array_equal(got, x, err_msg=name)


def test_a_keras_file_is_known_by_its_content(tmp_path):
  pytest.importorskip('h5py')
  renamed = tmp_path / 'adapter.bin'
  shutil.copy(GOLDEN / 'keras' / 'gemma1.lora.h5', renamed)
  lora_config, _, trained = adapter.read_adapter(renamed, CONFIGS['gemma1'])
  assert lora_config.factorization == 'keras'
  assert trained == {}


@pytest.mark.parametrize(
  ('name', 'found'), [('missing', 'neither a file nor a folder'), ('text.h5', 'no HDF5 file')]
)
def test_anything_else_is_refused(tmp_path, name, found):
  (tmp_path / 'text.h5').write_text('nothing')
  with pytest.raises(ValueError, match=f'which is {found}'):
    adapter.read_adapter(tmp_path / name, CONFIGS['gemma1'])
