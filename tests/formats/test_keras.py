import dataclasses
from pathlib import Path
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import pytree
from gemma_jax.config.train import LoraConfig
from gemma_jax.export import convert
from gemma_jax.formats import adapter, keras
from gemma_jax.model import layout
from gemma_jax.model.config import ModelConfig
from tests import hf_toy, logits_toy, toy

h5py = pytest.importorskip('h5py')

GOLDEN = Path(__file__).parents[1] / 'golden' / 'keras'
GEMMA1 = ModelConfig(
  vocab_size=53, embed_dim=22, hidden_dim=13, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6
)
CONFIGS = {
  'gemma1': GEMMA1,
  'gemma2': dataclasses.replace(GEMMA1, use_post_norms=True),
  'gemma3': dataclasses.replace(GEMMA1, use_post_norms=True, use_qk_norm=True),
}
NAMES = {
  'attention.query': 'attn/q',
  'attention.key': 'attn/k',
  'attention.value': 'attn/v',
  'attention.attention_output': 'attn/o',
  'ffw_gating': 'mlp/gate',
  'ffw_gating_2': 'mlp/up',
  'ffw_linear': 'mlp/down',
}


@pytest.mark.parametrize('family', CONFIGS)
def test_updates_are_those_of_keras(family):
  """Each kernel's difference in Keras, by the name that Keras has for it."""
  config, factors = keras.read_lora(GOLDEN / f'{family}.lora.h5', CONFIGS[family])
  assert config == LoraConfig(
    rank=3,
    alpha=3.0,
    targets='all' if family == 'gemma2' else 'qv',
    factorization='keras',
    init='keras',
  )
  got = dict(pytree.items(toy.deltas(factors, config.scale, CONFIGS[family])))
  want = {}
  with np.load(GOLDEN / f'{family}.npz') as file:
    for path, x in file.items():
      block, _, name = path.partition('.')
      want[int(block.removeprefix('decoder_block_')), NAMES[name]] = x
  assert {(i, n) for n in config.target_names for i in range(2)} == {
    (i, n.split('/')[1]) for i, n in want
  }
  for (i, name), x in want.items():
    np.testing.assert_allclose(got[f'layers/{name}/w'][i], x, 1e-5, 1e-5, err_msg=f'{i} {name}')


def test_unrolled_is_scanned_unstacked():
  path = GOLDEN / 'gemma2.lora.h5'
  _, scanned = keras.read_lora(path, CONFIGS['gemma2'])
  _, unrolled = keras.read_lora(path, CONFIGS['gemma2'], scan_layers=False)
  hf_toy.assert_trees_equal(unrolled, layout.unstack_layers(scanned))


def test_layers_are_numbered_as_in_the_2b_model():
  """11 layers with weights a block; the tutorial's files have 8, 10, 19 ..."""
  names = keras.layer_names(dataclasses.replace(GEMMA1, num_layers=18))
  assert [i for i, n in names.items() if n.endswith('/v')] == [8 + 11 * i for i in range(18)]
  assert names[10] == 'layer_0/attn/q'
  assert names[197] == 'layer_17/attn/q'


def test_adapter_is_recognised_by_its_content(tmp_path):
  path = tmp_path / 'weights'
  shutil.copy(GOLDEN / 'gemma1.lora.h5', path)
  lora = adapter.read(path, GEMMA1)
  want_config, want = keras.read_lora(path, GEMMA1)
  assert (lora.config, lora.trained_base) == (want_config, {})
  hf_toy.assert_trees_equal(lora.factors, want)
  (tmp_path / 'x.lora.h5').write_text('no HDF5')
  with pytest.raises(ValueError, match='which is not an HDF5 file'):
    adapter.read(tmp_path / 'x.lora.h5', GEMMA1)
  with pytest.raises(ValueError, match='neither a file nor a folder'):
    adapter.read(tmp_path / 'nothing', GEMMA1)


def test_it_becomes_a_peft_folder_and_a_merged_model(tmp_path, monkeypatch):
  base = logits_toy.source_of(GEMMA1)
  monkeypatch.setattr(convert.open_base, 'open_base', _open_base(base))
  path = str(GOLDEN / 'gemma1.lora.h5')
  result = convert.convert('toy', str(tmp_path / 'peft'), 'peft', path)
  assert result['largest_logit_difference'] < 1e-4
  lora = adapter.read(tmp_path / 'peft', GEMMA1)
  assert lora.config.factorization == 'matrix'
  assert lora.factors['layers']['attn']['q']['lora_a'].shape == (2, 22, 4 * 3)
  keras_config, keras_factors = keras.read_lora(Path(path), GEMMA1)
  got = dict(pytree.items(toy.deltas(lora.factors, lora.scale, GEMMA1)))
  for name, x in pytree.items(toy.deltas(keras_factors, keras_config.scale, GEMMA1)):
    np.testing.assert_allclose(got[name], x, 1e-5, 1e-5, err_msg=name)
  result = convert.convert('toy', str(tmp_path / 'hf'), 'hf', path)
  assert result['largest_logit_difference'] < 1e-3


def _open_base(base):
  real = convert.open_base.open_base
  return lambda r, t='': base if r == 'toy' else real(r, t)


def edit(tmp_path, change, family='gemma1'):
  path = tmp_path / 'edited.lora.h5'
  shutil.copy(GOLDEN / f'{family}.lora.h5', path)
  with h5py.File(path, 'r+') as file:
    change(file)
  return path


KERNEL = 'lora/8/vars/lora_kernel_a'
RANK = 'lora/vars/rank'


def _replace(make):
  """An edit that puts something else in a kernel's place."""

  def change(file):
    values = file[KERNEL][()]
    del file[KERNEL]
    make(file, values)

  return change


def _external(file, values):
  """Raw data in a file of its own, which is there."""
  raw = Path(file.filename).with_name('raw')
  raw.write_bytes(values.tobytes())
  file.create_dataset(KERNEL, values.shape, 'f4', external=[(str(raw), 0, values.nbytes)])


def _time(file, values):
  """A type of HDF5 that NumPy does not have."""
  space = h5py.h5s.create_simple(values.shape)
  h5py.h5d.create(file.id, KERNEL.encode(), h5py.h5t.UNIX_D32LE, space)


def _rank(value):
  return lambda f: (f.pop(RANK), f.__setitem__(RANK, value))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda f: f.move('lora/10', 'lora/9'), 'lora/9/.* has shape'),
    (lambda f: f.move('lora/10', 'lora/11'), "lora holds '11', which is not a proj"),
    (lambda f: f.move('lora/21', 'lora/32'), "lora holds '32', which is not a proj"),
    (lambda f: f.__delitem__('lora/19'), 'layer_1/attn/v has no factors'),
    (lambda f: f.__delitem__('lora/8/vars/lora_kernel_b'), 'kernel_b is miss'),
    (lambda f: f.__delitem__('lora/vars/rank'), 'lora/vars/rank is missing'),
    (lambda f: f.move('lora/8', 'lora/embedding'), "lora holds 'embedding'"),
    (lambda f: f.move('lora', 'other'), 'lora/vars/rank is missing'),
    (
      _replace(lambda f, x: f.create_dataset(KERNEL, data=x[:, :19])),
      rf'{KERNEL} has shape \(2, 19, 3\), expected \(2, 22, 3\)',
    ),
    (
      _replace(lambda f, x: f.create_dataset(KERNEL, data=x.astype('S1'))),
      f'{KERNEL} is of bytes8, expected float16 or',
    ),
    (_replace(lambda f, x: f.create_group(KERNEL)), f'{KERNEL} is no dataset of numbers'),
    (_replace(_time), f'{KERNEL} is no dataset of numbers'),
    (
      _replace(lambda f, x: f.__setitem__(KERNEL, h5py.ExternalLink('/etc/x', 'a'))),
      f'{KERNEL} is missing or a link',
    ),
    (
      lambda f: (f.move('lora', 'l'), f.update(lora=h5py.SoftLink('/l'))),
      f'{RANK} is missing or a link',
    ),
    (_replace(_external), f'{KERNEL} is stored in chunks or in another file'),
    (
      _replace(lambda f, x: f.create_dataset(KERNEL, x.shape, 'f4')),
      f'{KERNEL} stores 0 bytes, expected all 528',
    ),
    (
      _replace(lambda f, x: f.create_dataset(KERNEL, data=0 * x, compression='gzip')),
      f'{KERNEL} is stored in chunks',
    ),
    (
      _replace(lambda f, x: f.create_dataset(KERNEL, data=x * np.nan)),
      rf'tensor {KERNEL} is nan at \[0, 0, 0\], expected finite',
    ),
    (_rank(3.5), f'{RANK} is of float64, expected int32 or int64'),
    (_rank(float('inf')), f'{RANK} is of float64'),
    (_rank(0), f'{RANK} is 0, expected 1 to 65535'),
    (lambda f: f.copy('lora/10', 'lora/010'), "lora holds '010', which is not a"),
    (lambda f: f.move('lora/10', 'lora/1\n0'), r"lora holds '1\\n0', which is"),
    (lambda f: f.move('lora/10', b'lora/1\xff'), r"lora holds b'1\\xff'"),
  ],
)
def test_files_that_do_not_fit(change, message, tmp_path):
  path = edit(tmp_path, change)
  with pytest.raises(ValueError, match=message) as e:
    keras.read_lora(path, GEMMA1)
  assert str(path) in str(e.value)
  assert '\n' not in str(e.value)


def test_factors_must_fit_into_the_file(tmp_path):
  """One layer under the names of 99: each is whole, together they are not."""

  def repeat(file):
    for i in range(2, 100):
      file[f'lora/{8 + 11 * i}'] = file['lora/8']
      file[f'lora/{10 + 11 * i}'] = file['lora/10']

  path = edit(tmp_path, repeat)
  message = f'factors are 172800 bytes, .* {path.stat().st_size}; it is damaged'
  with pytest.raises(ValueError, match=message):
    keras.read_lora(path, dataclasses.replace(GEMMA1, num_layers=100))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float64'])
def test_factors_of_another_type(dtype, tmp_path):
  """Keras stores bfloat16 as two bytes that HDF5 knows nothing of."""

  def change(file):
    for key in ('8', '10', '19', '21'):
      group = file[f'lora/{key}/vars']
      for name in ('lora_kernel_a', 'lora_kernel_b'):
        values = group.pop(name)[()].astype(jnp.dtype(dtype))
        made = group.create_dataset(name, data=values)
        if dtype == 'bfloat16':
          made.attrs['dtype'] = 'bfloat16'

  _, want = keras.read_lora(GOLDEN / 'gemma1.lora.h5', GEMMA1)
  _, got = keras.read_lora(edit(tmp_path, change), GEMMA1)
  rounded = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)).astype(np.float32), want)
  hf_toy.assert_trees_equal(got, rounded)


def test_adapter_of_another_architecture():
  with pytest.raises(ValueError, match='for another architecture'):
    keras.read_lora(GOLDEN / 'gemma1.lora.h5', CONFIGS['gemma3'])
  with pytest.raises(ValueError, match='for another architecture'):
    keras.read_lora(GOLDEN / 'gemma1.lora.h5', dataclasses.replace(GEMMA1, num_layers=1))


def test_truncated_file(tmp_path):
  path = tmp_path / 'cut.lora.h5'
  whole = (GOLDEN / 'gemma1.lora.h5').read_bytes()
  for size in (8, 100, len(whole) // 2, len(whole) - 9):
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match='is damaged'):
      keras.read_lora(path, GEMMA1)
