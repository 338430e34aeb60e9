"""What a batch of adapters needs and gains on a slice that is not here."""

import dataclasses
import math

import pytest

from gemma_jax.config.sweep import GridConfig, SweepConfig
from gemma_jax.runs import prepare
from gemma_jax.sweep import forecast, plan
from gemma_jax.tpu import hlo, topology
from tests.launch.test_launch import call
from tests.tpu import test_forecast
from tests.tpu.test_forecast import SMALL, small  # noqa: F401

# So short that a chip waits for the weights; five is no size of the model.
LENGTH, RANKS, SEEDS = 128, (1, 2, 3, 5, 8), (0, 1)
V5E = topology.parse('v5e:1x1')


def sweep_config(**grid):
  base = test_forecast.make_config(rows=1, fsdp=1)
  base = dataclasses.replace(base, data=dataclasses.replace(base.data, seq_len=LENGTH))
  return SweepConfig(base, GridConfig(RANKS, SEEDS, **grid)).resolve()


@pytest.fixture(scope='module')
def found(small):  # noqa: F811
  (found,) = forecast.forecast(sweep_config(), V5E)
  return found


@pytest.mark.aot
class TestGang:
  def test_seeds_share_a_plan_and_ranks_a_gang(self, found):
    assert (found.num_trials, found.num_batches) == (10, 2)
    ranks = [name.split('-')[0] for name in found.names]
    assert ranks == [f'r{rank}' for rank in RANKS]

  def test_the_base_is_there_once(self, found):
    alone, together = found.alone.part_bytes, found.together.part_bytes
    assert together['base'] == alone['base']
    assert together['batch'] == alone['batch']
    assert together['adapter'] == len(RANKS) * alone['adapter']
    assert found.together.needed_bytes < len(RANKS) * found.alone.needed_bytes

  def test_a_kernel_is_read_once_for_all_members(self, found):
    """No array holds one for each; activations do stand there K times."""
    outline, size = found.together.outline, len(RANKS)
    program = outline.program(1, size)
    batch = prepare.abstract_batch(program, outline.config)
    text = program.compile_train_step(batch).as_text()
    assert 'splash_mha_fwd' in text and 'splash_mha_dkv' in text
    D, F, V = SMALL.embed_dim, SMALL.hidden_dim, SMALL.vocab_size
    shapes = hlo.arrays(text)
    assert any(math.prod(s) == size * LENGTH * F for s in shapes)
    for shape in shapes:
      for kernel in ({D, F}, {D, V}):
        assert not (size in shape and kernel <= set(shape)), shape

  def test_gain_is_what_reading_the_base_once_saves(self, found):
    alone, together = found.alone, found.together
    size = len(RANKS)
    assert together.work.model_flops == size * alone.work.model_flops
    assert alone.work.hbm_bytes < together.work.hbm_bytes
    assert together.work.hbm_bytes < size * alone.work.hbm_bytes
    assert found.gain == pytest.approx(size * alone.bound.secs / together.bound.secs)
    assert alone.bound.bound_by == 'HBM'
    assert 1.2 < found.gain < size
    last = found.report().splitlines()[-1]
    assert last.endswith(f'{found.gain:.2f} times as fast')


@pytest.mark.aot
def test_a_limit_divides_the_gang(found):
  limit = found.together.needed_bytes / 2**30 - 1e-6
  (divided,) = forecast.forecast(sweep_config(memory_gib=limit), V5E)
  assert divided.num_batches == 4
  assert len(divided.names) == divided.together.members == 3


@pytest.mark.aot
def test_the_command_prints_the_gain():
  done = call(
    'sweep',
    '--config=experiments/rank_ablation.py',
    '--dry_run',
    '--topology=v5e:1x1',
    '--config.model.path=random:tiny3',
    '--config.data.seq_len=128',
    '--config.grid.seeds=(0,)',
  )
  assert done.returncode == 0, done.stderr
  assert '25 adapters at once' in done.stdout  # 32 is too large for tiny3
  assert done.stdout.strip().endswith('times as fast')


@pytest.mark.parametrize('flag', ['--dry_run', '--topology=v5e:1x1'])
def test_dry_run_and_topology_belong_together(flag):
  done = call('sweep', '--config=experiments/rank_ablation.py', flag)
  assert done.returncode == 1
  assert done.stderr.splitlines() == [
    'error: --dry_run, --topology: got one, expected both or neither'
  ]


@pytest.mark.parametrize(
  'count, max_size, fits, sizes',
  [
    (6, 0, 6, [6]),
    (6, 4, 6, [3, 3]),
    (7, 0, 3, [2, 3, 2]),
    (5, 0, 1, [1, 1, 1, 1, 1]),
    (3, 0, 0, [1, 1, 1]),  # not even one fits: it is tried, with a warning
  ],
)
def test_division(count, max_size, fits, sizes):
  base, each = 1000, 10
  parts = plan.divide(
    count,
    lambda size: base + each * size,
    max_size=max_size,
    limit_bytes=base + each * fits,
    base_bytes=base,
  )
  assert [len(part) for part in parts] == sizes
  assert [i for part in parts for i in part] == list(range(count))
