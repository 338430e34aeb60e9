"""Which kernel a model gets, and that the model does not notice."""

import types

import jax
import numpy as np
import pytest

from gemma_jax.config.train import MeshConfig
from gemma_jax.model import attention, blocks, cudnn, kernels, splash, variants
from gemma_jax.model.transformer import Transformer
from gemma_jax.training import sharding
from tests import toy

CPU = sharding.make_mesh(MeshConfig(fsdp=1))


def choose(name, config=variants.GEMMA_2B, dtype='bfloat16', mesh=CPU):
  return kernels.choose(name, config, dtype, mesh, ('fsdp',), 'tensor')


def gpu_mesh(capability):
  """Stands in for a mesh on a GPU, of which there is none here."""
  device = types.SimpleNamespace(platform='gpu', device_kind='a GPU', compute_capability=capability)
  return types.SimpleNamespace(devices=np.array([[[device]]]))


def tpu_mesh(version):
  """Stands in for a mesh on a TPU."""
  device = types.SimpleNamespace(platform='tpu', device_kind=f'TPU {version}')
  return types.SimpleNamespace(devices=np.array([[[device]]]))


def test_by_name_and_by_platform():
  assert choose('auto') is blocks.attend
  assert choose('einsum', mesh=gpu_mesh('9.0')) is attention.attend_by_einsum
  assert choose('auto', mesh=gpu_mesh('9.0')) is cudnn.attend
  assert choose('cudnn', mesh=gpu_mesh('9.0')) is cudnn.attend
  assert choose('blocks', mesh=gpu_mesh('9.0')) is blocks.attend
  assert choose('splash') == splash.Splash(CPU, ('fsdp',), 'tensor', True)


def test_auto_falls_back_and_says_why(caplog):
  caplog.set_level('INFO')
  got = choose('auto', variants.GEMMA2_2B, mesh=gpu_mesh('9.0'))
  assert got is attention.attend_by_einsum
  assert 'Attention by einsum; cudnn: it has no soft cap' in caplog.text
  assert choose('auto', mesh=tpu_mesh('v3')) is attention.attend_by_einsum
  assert 'splash: it takes float32 activations on TPU v3' in caplog.text
  for dtype, version in (('float32', 'v3'), ('bfloat16', 'v4')):
    got = choose('auto', dtype=dtype, mesh=tpu_mesh(version))
    assert isinstance(got, splash.Splash)


@pytest.mark.parametrize(
  ('name', 'mesh', 'reason'),
  [
    ('cudnn', CPU, 'on a GPU, not on cpu'),
    ('cudnn', gpu_mesh('8.0'), 'head_dim up to 128'),
    ('splash', gpu_mesh('9.0'), 'runs on a TPU'),
    ('splash', tpu_mesh('v3'), 'float32 activations on TPU v3, not bfloat16'),
  ],
)
def test_a_kernel_asked_for_by_name_is_not_replaced(name, mesh, reason):
  with pytest.raises(ValueError, match=rf'model\.attention: .*{reason}'):
    choose(name, mesh=mesh)


@pytest.mark.usefixtures('strict', 'quick_compile')
@pytest.mark.parametrize(('name', 'length'), [('splash', 37), ('blocks', 300)])
def test_a_model_is_the_same_with_any_kernel(name, length):
  """Under scan, remat and the choice between local and global layers."""
  batch, base = toy.batch(length=length), toy.base()

  def loss_and_gradients(attend):
    model = Transformer(toy.FULL, attend=attend)
    loss = lambda lora: toy.loss(model, {'params': base, 'lora': lora}, batch)
    return jax.jit(jax.value_and_grad(loss))(toy.factors())

  got, got_grads = loss_and_gradients(choose(name, toy.FULL))
  want, want_grads = loss_and_gradients(attention.attend_by_einsum)
  assert abs(got - want) <= 1e-5 * max(1.0, want)
  toy.assert_close(got_grads, want_grads, 1e-5)
