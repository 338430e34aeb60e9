"""What the TPU's compiler says of a step, and the search for what fits."""

import dataclasses
import json
import math

import pytest

from gemma_jax import pytree
from gemma_jax.config.train import MeshConfig
from gemma_jax.model import layout, variants
from gemma_jax.model.config import ModelConfig
from gemma_jax.runs import prepare
from gemma_jax.tpu import chips, forecast, hlo, roofline, topology
from tests import run_toy
from tests.launch.test_launch import call

# No two sizes can be confused, and all divide over 2 x 2; rows of 640 make
# several blocks of the attention kernel.
SMALL = ModelConfig(
  vocab_size=3072,
  embed_dim=256,
  hidden_dim=384,
  num_layers=3,
  num_heads=4,
  num_kv_heads=1,
  head_dim=128,
  layer_is_local=(True, False, True),
  window_size=200,
)
ROWS, LENGTH = 4, 640


def make_config(rows=ROWS, **mesh):
  config = run_toy.config('no data is read')
  config.model.path = 'random:small'
  config.model.dtype = 'bfloat16'
  config.mesh = MeshConfig(**mesh)
  config.data.seq_len, config.data.global_batch_size = LENGTH, rows
  return config.resolve()


@pytest.fixture(scope='module')
def small():
  variants.VARIANTS['small'] = SMALL
  yield
  del variants.VARIANTS['small']


def text_of(found):
  """HLO text of the training step."""
  program = found.outline.program(steps=1)
  batch = prepare.abstract_batch(program, found.outline.config)
  return program.compile_train_step(batch).as_text()


@pytest.fixture(scope='module')
def compiled(small):
  """(forecast, HLO text) of a real step for four chips."""
  found = forecast.forecast(make_config(fsdp=2, tensor=2), topology.parse('v5e:2x2'))
  return found, text_of(found)


@pytest.mark.aot
class TestCompiledStep:
  def test_memory_is_what_the_shards_hold(self, compiled):
    found, _ = compiled
    assert found.fits
    parts = found.part_bytes
    base = pytree.num_bytes(layout.abstract_params(SMALL, 'bfloat16'))
    k_and_v = 2 * 2 * 3 * 256 * 128  # one kv head: whole on both of `tensor`
    norms = 2 * (3 * 2 + 1) * 256
    assert parts['base'] == (base - k_and_v - norms) / 4 + k_and_v / 2 + (norms / 2)
    assert parts['optimizer'] == 2 * parts['adapter'] + 8
    assert parts['batch'] == 5 * 4 * ROWS * LENGTH / 2
    assert parts['temporaries'] > 0
    assert sum(parts.values()) == pytest.approx(found.needed_bytes, rel=0.01)

  def test_attention_runs_in_the_kernel_without_a_score_array(self, compiled):
    _, text = compiled
    assert 'splash_mha_fwd' in text and 'splash_mha_dkv' in text
    for shape in hlo.arrays(text):
      assert sum(size >= LENGTH for size in shape) < 2 or LENGTH not in shape

  def test_no_array_holds_the_logits(self, compiled):
    """The embedding itself is [V, D]; a tile of logits has 512 positions."""
    _, text = compiled
    positions = ROWS // 2 * LENGTH
    for shape in hlo.arrays(text):
      for vocab in (SMALL.vocab_size, SMALL.vocab_size // 2):
        if vocab in shape:
          assert math.prod(shape) < positions * vocab, shape

  def test_the_base_is_gathered_layer_by_layer(self, compiled):
    """In the scan [D, F / 2] of a layer, and never [L, D, F / 2]."""
    found, text = compiled
    L, D, F = SMALL.num_layers, SMALL.embed_dim, SMALL.hidden_dim
    shapes = hlo.arrays(text)
    assert (L, D // 2, F // 2) in shapes  # what a device holds
    assert shapes & {(1, D, F // 2), (D, F // 2)}  # what it computes with
    for whole in ((L, D, F // 2), (L, F // 2, D), (L, D, F), (L, F, D)):
      assert whole not in shapes
    counts = [c.count for c in found.collectives if c.kind == 'all-gather']
    assert counts.count(L) >= len(layout.PROJECTION_EQUATIONS)

  def test_report_and_json_say_the_same(self, compiled):
    found, _ = compiled
    text, figures = found.report(), json.loads(json.dumps(found.to_json()))
    assert text.splitlines()[-1].startswith('fits: ')
    assert figures['fits'] and figures['hbm_bytes'] == 15.75 * 2**30
    assert f'bound by {figures["bound_by"]}' in text
    assert f'{figures["tokens_per_sec"]:,.0f} tokens/s' in text
    assert 0 < figures['mfu'] < 1
    for kind in figures['collectives']:
      assert kind in text


@pytest.mark.aot
def test_rows_are_rounded_up_to_the_mesh_and_said_so(small, caplog):
  config = make_config(rows=3, fsdp=2)
  found = forecast.forecast(config, topology.parse('v5e:1x2'))
  assert found.outline.config.data.global_batch_size == 4
  assert 'needs data.global_batch_size=4' in caplog.text


@pytest.mark.aot
def test_what_does_not_fit_says_how_much_it_needs(small):
  found = forecast.forecast(make_config(rows=40_000, fsdp=1), topology.parse('v5e:1x1'))
  assert not found.fits
  assert found.needed_bytes > found.topology.chip.hbm_bytes
  assert found.report().splitlines()[-1].startswith('does not fit: needs ')
  assert found.to_json()['fits'] is False


@pytest.mark.aot
@pytest.mark.parametrize('name', ['v4:2x2x1', 'v5p:2x2x1', 'v6e:2x2', 'v3:1x2'])
def test_every_version_compiles_the_kernels(small, name):
  """On v3 in float32; in bfloat16 it has no kernel, and compiles without."""
  config = make_config(fsdp=2, tensor=2)
  if name.startswith('v3'):
    assert forecast.forecast(config, topology.parse(name)).fits
    config = dataclasses.replace(
      config, model=dataclasses.replace(config.model, activation_dtype='float32')
    )
  found = forecast.forecast(config, topology.parse(name))
  assert found.fits
  assert 'splash_mha_dkv' in text_of(found)


@pytest.mark.aot
def test_between_slices_only_gradients_travel(small):
  """Data over slices, parameters within: the base never crosses."""
  found = forecast.forecast(make_config(data=2, fsdp=2), topology.parse('2xv5e:1x2'))
  devices = found.outline.base.mesh.devices.flat
  slices = [d.slice_index for d in devices]
  assert sorted(slices) == [0, 0, 1, 1]
  crossing = [c for c in found.collectives if c.crosses(slices)]
  assert crossing
  sent = sum(c.sent_bytes for c in crossing)
  # Factors in float32, there and back; and a few sums.
  assert sent < 3 * found.part_bytes['adapter'] + 10_000


@pytest.mark.aot
@pytest.mark.slow
def test_gemma_2b_fits_one_v5e_chip_at_2048():
  config = run_toy.config('no data is read')
  config.model.path, config.model.dtype = 'random:gemma_2b', 'bfloat16'
  config.lora.rank = 8
  config.data.seq_len, config.data.global_batch_size = 2048, 1
  found = forecast.forecast(config.resolve(), topology.parse('v5e:1x1'))
  assert found.fits
  assert found.needed_bytes < 15.75 * 2**30


def fake(rows, needed):
  """A forecast of so many rows with so much memory, of a v5e."""
  topo = topology.parse('v5e:1x1')
  fits = needed <= topo.chip.hbm_bytes
  return forecast.Forecast(
    outline=None,
    topology=topo,
    needed_bytes=int(needed),
    part_bytes={'base': int(needed) // 2, 'adapter': 0, 'optimizer': 0},
    collectives=(),
    work=roofline.Work(1, 1, 1),
    bound=roofline.Bound(1, 1, 1, rows, 1) if fits else None,
  )


@pytest.mark.parametrize('largest', [1, 2, 3, 7, 8, 61, 500])
@pytest.mark.parametrize('curve', [1.0, 1.1, 0.9])
@pytest.mark.parametrize('fixed', [0.0, 0.3, 0.9])
@pytest.mark.parametrize('start', [1, 5, 200])
def test_the_search_finds_the_largest_that_fits(monkeypatch, largest, curve, fixed, start):
  """Also where memory does not grow quite in proportion to the rows."""
  capacity = chips.CHIPS['v5e'].hbm_bytes
  asked = []

  def memory(rows):
    growing = (rows / (largest + 0.5)) ** curve
    return capacity * (fixed + (1 - fixed) * growing)

  def forecast_of(config, topo):
    rows = config.data.global_batch_size
    asked.append(rows)
    return fake(rows, memory(rows))

  monkeypatch.setattr(forecast, 'forecast', forecast_of)
  monkeypatch.setattr(topology.Topology, 'devices', lambda _: None)
  config = make_config(rows=start, fsdp=1)
  found = forecast.largest_fit(config, topology.parse('v5e:1x1'))
  assert found.bound.tokens == largest
  assert asked[0] == start
  assert len(asked) == len(set(asked)) <= 7


def test_if_nothing_fits_the_search_says_what_one_row_needs(monkeypatch):
  capacity = chips.CHIPS['v5e'].hbm_bytes
  monkeypatch.setattr(forecast, 'forecast', lambda config, _: fake(1, 2 * capacity))
  monkeypatch.setattr(topology.Topology, 'devices', lambda _: None)
  found = forecast.largest_fit(make_config(fsdp=1), topology.parse('v5e:1x1'))
  assert not found.fits
  assert found.needed_bytes == 2 * capacity


@pytest.mark.parametrize(
  ('message', 'gib'),
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
      'for HLO temporaries (256.00G) exceeds available HBM (15.75G).',
      256,
    ),
    (
      'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory '
      'in memory space hbm. Used 19.02G of 15.75G hbm. Exceeded hbm capacity '
      'by 3.27G.',
      19.02,
    ),
    ('RESOURCE_EXHAUSTED: out of something else', None),
    ('INTERNAL: 19.02G of 15.75G hbm', None),
  ],
)
def test_the_compilers_message_says_what_it_needs(message, gib):
  got = forecast._needed_bytes(message)
  assert got is None if gib is None else got == int(gib * 2**30)


class TestCommand:
  def test_a_topology_needs_a_dry_run(self, tmp_path):
    config = run_toy.config_file(tmp_path, 'no data')
    done = call('train', f'--config={config}', '--topology=v5e:1x1')
    assert done.returncode == 1
    assert 'error: --topology: got one without --dry_run' in done.stderr

  def test_an_unknown_topology_lists_those_there_are(self, tmp_path):
    config = run_toy.config_file(tmp_path, 'no data')
    flags = [f'--config={config}', '--dry_run', '--topology=v7x:2x2']
    done = call('train', *flags)
    assert done.returncode == 1
    assert "error: --topology: got 'v7x:2x2', expected one of v3:2x2" in (done.stderr)

  @pytest.mark.aot
  @pytest.mark.parametrize(('rows', 'code'), [(2, 0), (1_000_000, 1)])
  def test_the_exit_code_says_whether_it_fits(self, tmp_path, rows, code):
    """With no data set, no workdir and no weight."""
    config = run_toy.config_file(tmp_path, 'tfds:there_is_no_such_data')
    flags = [
      f'--config={config}',
      f'--config.data.global_batch_size={rows}',
      '--dry_run',
      '--topology=v5e:1x1',
      '--format=json',
    ]
    done = call('train', *flags)
    assert done.returncode == code, done.stderr
    figures = json.loads(done.stdout)
    assert figures['fits'] == (code == 0)
    assert figures['global_batch_size'] == rows
