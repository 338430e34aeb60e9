"""What a user hands to the wrong door: each says what it takes."""

import numpy as np
import optax
import pytest

import gemma_jax as gj
from gemma_jax.config.train import DataConfig
from tests import toy

ROWS = [{'prompt': f'Where is {i}?', 'response': 'Here.'} for i in range(4)]
A_BASE = r'expected a loaded base, gemma_jax\.load\(\.\.\.\)'


@pytest.fixture(scope='module')
def base():
  return gj.load('random:tiny3', mesh=gj.MeshConfig(fsdp=1))


@pytest.fixture(scope='module')
def lora(base):
  return gj.Lora.init(base, rank=2)


@pytest.mark.parametrize(
  'call, message',
  [
    (
      lambda base, lora: gj.generate('random:tiny3', 'Where?'),
      f"base: got 'random:tiny3', {A_BASE}",
    ),
    (lambda base, lora: gj.evaluate('random:tiny3', ROWS), A_BASE),
    (lambda base, lora: gj.Trainer('random:tiny3', lora, []), A_BASE),
    (lambda base, lora: gj.Lora.init('random:tiny3'), A_BASE),
    (lambda base, lora: gj.Lora.load('folder', 'random:tiny3'), A_BASE),
    (lambda base, lora: gj.Dataset(base, ROWS), f'base: got list, {A_BASE}'),
    (lambda base, lora: gj.Dataset(7, base), 'records: got int, expected the name of a source'),
    (lambda base, lora: gj.generate(base, 'Where?', lora='folder'), "lora: got 'folder', expected"),
    (lambda base, lora: gj.evaluate(base, ROWS, lora=lora), 'data: got list, expected a Dataset'),
    (lambda base, lora: gj.Trainer(base, 'folder', []), "lora: got 'folder', expected a Lora"),
    (lambda base, lora: gj.Trainer(base, lora, 'sample:seoul_travel'), 'data: got str, expected'),
    (lambda base, lora: gj.Trainer(base, lora, DataConfig()), 'data: got DataConfig, expected'),
    (
      lambda base, lora: gj.Trainer(base, lora, ROWS).step(ROWS[0]),
      'batch: got a scalar at prompt, expected .*; a Dataset makes batches of records',
    ),
    (lambda base, lora: gj.Lora.init(base, targets=['q', 'v']), r"lora\.targets: got \['q', 'v'\]"),
    (lambda base, lora: gj.Lora.init(base, seed='a'), "seed: got 'a', expected an integer in"),
    (
      lambda base, lora: gj.load('random:tiny3', mesh={'fsdp': 1}),
      'mesh: got dict, expected a M',
    ),
    (lambda base, lora: gj.convert(base, 'folder', 'hf'), 'model: got Base, .* base.reference'),
    (
      lambda base, lora: gj.convert('random:tiny3', 'folder', 'hf', adapter=lora),
      r'adapter: got Lora, expected a folder; lora\.save\(FOLDER\) writes one',
    ),
  ],
)
def test_each_door_says_what_it_takes(base, lora, call, message):
  with pytest.raises(ValueError, match=message):
    call(base, lora)


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'optimizer': 'adam'}, r"optimizer: got 'adam', expected .* E\.g\. optax\.adam\(1e-3\)"),
    ({'optimizer': optax.adam}, 'optimizer: got <function adam .* expected an OptimizerConfig or'),
    ({'loss_fn': 'focal'}, "loss_fn: got 'focal', expected a function"),
    ({'learning_rate': '1e-3'}, "learning_rate: got '1e-3', expected a number"),
    ({'learning_rate': [1e-3]}, r'learning_rate: got \[0\.001\], expected a number\.'),
    ({'seed': -1}, 'seed: got -1, expected an integer in'),
  ],
)
def test_settings_of_a_trainer(base, lora, settings, message):
  with pytest.raises(ValueError, match=message):
    gj.Trainer(base, lora, [], **settings)


def test_one_pattern_need_not_be_a_tuple(base, lora):
  assert gj.Trainer(base, lora, [], trainable='lora/').program.trainable == ('lora/',)


@pytest.mark.parametrize('leaf', ['tokens', 'targets'])
@pytest.mark.parametrize('value', [-100, 260])
def test_tokens_that_the_base_does_not_have(base, lora, leaf, value):
  trainer = gj.Trainer(base, lora, [])
  batch = {k: np.array(x) for k, x in toy.batch(2, 8, vocab_size=260).items()}
  batch['weights'][1, 7] = 0
  batch[leaf][1, 7] = value
  if leaf == 'targets':  # one that does not count may be anything
    assert np.isfinite(trainer.step(batch).loss)
    batch['weights'][1, 7] = 1
  last = base.num_pieces - 1
  with pytest.raises(ValueError, match=f'batch: got {leaf} from .*, expected 0 to {last}, the tok'):
    trainer.step(batch)


def test_rows_longer_than_the_base(base, lora):
  most = base.config.max_positions
  with pytest.raises(ValueError, match=f'got rows of {most + 1} tokens, expected at most {most}'):
    gj.Trainer(base, lora, []).step(toy.batch(1, most + 1, vocab_size=260))


def test_an_update_that_is_left_out_is_said(base, lora, caplog):
  def overflows(model, variables, batch, key):
    total, weight, metrics = gj.token_loss(model, variables, batch, key)
    return total * np.inf, weight, metrics

  trainer = gj.Trainer(base, lora, [toy.batch(2, 8, vocab_size=260)], loss_fn=overflows)
  assert len(list(trainer.run(1))) == 1
  assert 'Update 1 skipped: its loss or gradient is not finite' in caplog.text


def test_nothing_prints_its_arrays(base, lora):
  data = gj.Dataset(ROWS, base, heldout=ROWS, seq_len=32)
  for shown in (base, lora, gj.evaluate(base, data)):
    assert len(repr(shown)) < 400


def test_batches_of_tokens_alone(base, lora):
  """Whole rows without padding need no segment ids or positions."""
  batch = toy.batch(2, 8, vocab_size=260)
  whole = {
    **batch,
    'segment_ids': np.ones((2, 8), np.int32),
    'positions': np.tile(range(8), (2, 1)),
  }
  alone = {name: batch[name] for name in ('tokens', 'targets', 'weights')}
  first, second = (gj.Trainer(base, lora, []).step(x).loss for x in (whole, alone))
  np.testing.assert_allclose(first, second, rtol=1e-6)
