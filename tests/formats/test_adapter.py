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
  lora = adapter.read(GEMMA1 / 'adapter_qv', config)
  want_config, want = peft.read_adapter(GEMMA1 / 'adapter_qv', config)
  assert lora.config == want_config
  assert lora.scale == np.float32(want_config.scale) and lora.scale.dtype == np.float32
  assert lora.trained_base == {}
  for (name, got), (_, x) in zip(pytree.items(lora.factors), pytree.items(want), strict=True):
    np.testing.assert_array_equal(got, x, err_msg=name)


def test_a_keras_file_is_known_by_its_content(tmp_path):
  pytest.importorskip('h5py')
  renamed = tmp_path / 'adapter.bin'
  shutil.copy(GOLDEN / 'keras' / 'gemma1.lora.h5', renamed)
  lora = adapter.read(renamed, CONFIGS['gemma1'])
  assert lora.config.factorization == 'keras'
  assert lora.trained_base == {}


@pytest.mark.parametrize(
  ('name', 'found'), [('missing', 'neither a file nor a folder'), ('text.h5', 'not an HDF5 file')]
)
def test_anything_else_is_refused(tmp_path, name, found):
  (tmp_path / 'text.h5').write_text('nothing')
  with pytest.raises(ValueError, match=f'which is {found}'):
    adapter.read(tmp_path / name, CONFIGS['gemma1'])
