"""Attention in blocks equals einsum, and leaves out what nobody sees."""

import pytest

from gemma_jax.config import MeshConfig
from gemma_jax.model import attention, blocks
from tests.test_splash import assert_equals_einsum, make, output_and_gradients

pytestmark = [
  pytest.mark.usefixtures('strict', 'quick_compile'),
  pytest.mark.filterwarnings('error'),
]


@pytest.mark.parametrize(
  ('length', 'window', 'cap'),
  [(37, None, None), (128, 9, None), (300, None, 3.0), (300, 150, 3.0)],
)
def test_equals_einsum(length, window, cap):
  """One block, a whole one, and a last one that is short."""
  _, arrays = make(MeshConfig(fsdp=1), 2, length, 4, 2)
  assert_equals_einsum(blocks.attend, arrays, window, cap)


@pytest.mark.parametrize(
  ('window', 'share'),
  [(None, (1 + 8) / 16), (128, 2 / 8)],  # of 8 blocks, for each block of 8
)
def test_blocks_of_keys_that_nobody_sees_are_not_multiplied(window, share):
  _, arrays = make(MeshConfig(fsdp=1), 1, 1024, 4, 1)

  def work(attend):
    lowered = output_and_gradients.lower(attend, window, None, *arrays)
    return lowered.compile().cost_analysis()['flops']

  ratio = work(blocks.attend) / work(attention.attend_by_einsum)
  assert ratio == pytest.approx(share, rel=0.06)
