"""A `Trainer` in the hands of a caller: what goes in, what stays whole."""

import os
import signal
import time

import jax
import numpy as np
import optax
import pytest

from gemma_jax import pytree
from gemma_jax.config.train import BaseConfig, MeshConfig, OptimizerConfig
from gemma_jax.data.dataset import Dataset
from gemma_jax.lora.lora import Lora
from gemma_jax.runs.base import Base
from gemma_jax.runs.evaluate import Stopped
from gemma_jax.runs.program import Program
from gemma_jax.runs.trainer import Trainer
from tests import toy

pytestmark = pytest.mark.usefixtures('quick_compile')

V = 'params/layers/attn/v/w'
BATCHES = [toy.batch(4, seed=i) for i in range(4)]


@pytest.fixture(scope='module')
def base():
  return Base.open(BaseConfig(path='random:tiny3'), MeshConfig(fsdp=1)).load()


def make_lora(base, seed=0, rank=2):
  return Lora.init(base, rank=rank, targets='v', seed=seed)


def copy(tree):
  """In NumPy arrays that no donation can touch."""
  return jax.tree.map(np.array, tree)


def losses(trainer, steps):
  return [metrics.loss for metrics in trainer.run(steps)]


def mean_loss(model, variables, batch, key):
  """The default loss by another name, and the mean of its squares."""
  x = model.token_losses(variables, batch, key)
  weight = batch['weights'].sum()
  return x.sum(), weight, {'square': ((x * x).sum(), weight)}


@pytest.fixture(scope='module')
def trained(base):
  """(params and lora before, trainer, its adapter after two updates)."""
  lora = make_lora(base)
  before = copy((base.params, lora))
  trainer = Trainer(base, lora, BATCHES, learning_rate=0.1, trainable=('lora/', V))
  first = losses(trainer, 2)
  early = trainer.lora
  frozen_copy = copy(early)
  rest = losses(trainer, 2)
  return lora, before, trainer, (early, frozen_copy), first + rest


class TestWhatStaysWhole:
  def test_base_and_given_adapter(self, base, trained):
    """Also where leaves of the base are trained."""
    lora, before, *_ = trained
    toy.assert_equal(base.params, before[0])
    toy.assert_equal(lora.factors, before[1].factors)

  def test_an_earlier_adapter(self, trained):
    _, _, trainer, (early, as_it_was), _ = trained
    toy.assert_equal(early.factors, as_it_was.factors)
    toy.assert_equal(early.trained_base, as_it_was.trained_base)
    now = trainer.lora
    for tree, old in ((now.factors, early.factors), (now.trained_base, early.trained_base)):
      for (name, x), y in zip(pytree.items(tree), jax.tree.leaves(old), strict=True):
        assert np.any(x != y), name

  def test_a_second_run_goes_on(self, base, trained):
    """With the next batches, as one run would have; at their end it stops."""
    _, _, trainer, _, two_runs = trained
    whole = Trainer(base, make_lora(base), BATCHES, learning_rate=0.1, trainable=('lora/', V))
    assert losses(whole, 4) == two_runs
    assert trainer.finished == 4
    assert losses(trainer, 3) == []
    toy.assert_equal(whole.host_lora().factors, trainer.host_lora().factors)

  def test_a_trained_base_goes_on_from_its_adapter(self, trained):
    """On another mesh than that which the adapter lies on."""
    _, _, trainer, *_ = trained
    (want,) = [trainer.evaluate([BATCHES[0]])['loss']]
    other = Base.open(BaseConfig(path='random:tiny3'), MeshConfig(fsdp=2)).load()
    again = Trainer(other, trainer.lora, BATCHES)
    toy.assert_close(again.evaluate([BATCHES[0]])['loss'], want, 1e-5)
    assert losses(again, 1)


class TestBatches:
  def test_any_iterable_is_taken_once_and_not_ahead(self, base):
    taken = []

    def endless():
      for i in range(100):
        taken.append(i)
        yield BATCHES[i % 4]

    trainer = Trainer(base, make_lora(base), endless())
    steps = []
    for metrics in trainer.run(5):
      steps.append(metrics.step)
      if metrics.step == 2:
        break
    assert (steps, taken) == ([1, 2], [0, 1])
    assert [m.step for m in trainer.run(2)] == [3, 4]
    assert taken == [0, 1, 2, 3]

  def test_the_wait_for_each_is_measured(self, base):
    def slow_second():
      yield BATCHES[0]
      time.sleep(0.05)
      yield BATCHES[1]

    waits, started = [], time.perf_counter()
    for wait_seconds, batch in Trainer(base, make_lora(base), slow_second()).batches(2):
      assert batch['tokens'].shape == (4, 11)
      waits.append(wait_seconds)
      time.sleep(0.03)  # work between items is not waiting
    assert len(waits) == 2 and waits[1] >= 0.05
    assert time.perf_counter() - started - sum(waits) >= 0.06

  def test_a_dataset_goes_on_where_it_was(self, base):
    rows = [{'prompt': f'{i} + 1 =', 'response': f'{i + 1}'} for i in range(30)]
    make = lambda: Trainer(base, make_lora(base), Dataset(rows, base, seq_len=96), batch_size=2)
    whole, parts = make(), make()
    want = losses(whole, 4)
    assert losses(parts, 1) + losses(parts, 3) == want
    measured = parts.evaluate()
    assert measured.nll_per_token == whole.evaluate().nll_per_token
    assert len(measured.nll) == len(parts.data.heldout)

  @pytest.mark.parametrize('several', [False, True])
  def test_batches_are_evaluated_as_one(self, base, several):
    """Of any number of rows; a loss of one's own gives its metrics too."""
    lora = make_lora(base)
    lora = Lora.stack([lora, make_lora(base, 1, rank=3)]) if several else lora
    data = [toy.batch(3, seed=7), BATCHES[0]]
    make = lambda **options: Trainer(base, lora, data, accumulate_steps=2, **options)
    measured = make().evaluate(data)
    total = weight = 0.0
    for batch in data:
      total += base.model.token_losses({'params': base.params}, batch).sum()
      weight += batch['weights'].sum()
    want = np.full((2,) if several else (), total / weight, np.float64)
    toy.assert_close(measured['loss'], want, 1e-5)
    assert np.shape(measured['weight']) == want.shape
    own = make(loss_fn=mean_loss).evaluate(data)
    toy.assert_close(own['loss'], want, 1e-5)
    assert np.all(own['square'] > own['loss'])

  def test_evaluation_stops_when_asked(self, base):
    asked = iter([False, True])
    with pytest.raises(Stopped):
      Trainer(base, make_lora(base), BATCHES).evaluate(BATCHES, lambda: next(asked))
    with pytest.raises(ValueError, match='data: got no batch'):
      Trainer(base, make_lora(base), BATCHES).evaluate([])
    with pytest.raises(ValueError, match='data: got none'):
      Trainer(base, make_lora(base), BATCHES).evaluate()


def test_an_optimizer_of_ones_own_for_several_adapters(base):
  """No schedule is known; each learns what it learns alone."""
  loras = [make_lora(base, seed) for seed in (0, 1)]
  make = lambda lora: Trainer(base, lora, BATCHES, optimizer=optax.sgd(0.3))
  together = list(make(Lora.stack(loras)).run(2))
  alone = [list(make(lora).run(2)) for lora in loras]
  for step, metrics in enumerate(together):
    assert np.isnan(metrics.learning_rate).all()
    want = np.array([each[step].loss for each in alone])
    toy.assert_close(metrics.loss, want, 1e-5)
    assert metrics.of_member(1).loss == metrics.loss[1]


def test_one_training_and_one_evaluation_program(base, monkeypatch):
  compiled = []
  original = Program._compile
  monkeypatch.setattr(
    Program,
    '_compile',
    lambda self, name, *rest: compiled.append(name) or original(self, name, *rest),
  )
  trainer = Trainer(base, make_lora(base), BATCHES)
  assert compiled == []
  losses(trainer, 2)
  trainer.evaluate(BATCHES[:2])
  losses(trainer, 1)
  trainer.evaluate(BATCHES[2:])
  assert compiled == ['training step', 'evaluation step']


def test_ctrl_c_waits_until_the_update_is_assigned(base, ctrl_c):
  trainer = Trainer(base, make_lora(base), BATCHES)
  losses(trainer, 1)
  original = trainer._train_step

  class Interrupted:
    """The compiled step, during which Ctrl-C is pressed."""

    def program(self, batch):
      compiled = original.program(batch)

      def step(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return compiled(*arguments)

      return step

  trainer._train_step = Interrupted()
  with pytest.raises(KeyboardInterrupt):
    losses(trainer, 1)
  trainer._train_step = original
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  assert trainer.finished == 2
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(trainer.host_lora().factors))
  assert [metrics.step for metrics in trainer.run(1)] == [3]


@pytest.fixture(scope='module')
def trainer(base):
  return Trainer(base, make_lora(base), BATCHES, accumulate_steps=2, total_steps=3)


class TestRefusals:
  @pytest.mark.parametrize('steps', [0, -1, True, 2.0, '3'])
  def test_steps(self, trainer, steps):
    with pytest.raises(ValueError, match=rf'steps: got {steps!r}, expected an integer >= 1'):
      trainer.run(steps)

  def test_steps_beyond_the_schedule(self, trainer):
    with pytest.raises(ValueError, match=r'steps: got 4 after 0, expected at most 3'):
      trainer.run(4)

  @pytest.mark.parametrize(
    ('change', 'message'),
    [
      ({'tokens': np.zeros((4, 11), np.float32)}, 'got float32 at tokens, expected integer'),
      ({'weights': np.zeros((4, 11), np.int32)}, 'got int32 at weights, expected floating'),
      (
        {'tokens': np.zeros((2, 11), np.int32)},
        r"got different numbers of rows, .*'tokens': 2, .*expected one",
      ),
      ({'more': np.float32(1)}, 'got a scalar at more, expected an array whose leading'),
      ({'more': 'text'}, 'got a scalar at more, expected an array whose leading'),
      ({'more': np.array([None] * 4)}, 'got object at more, expected number values'),
      ({'more': jax.random.split(jax.random.key(0), 4)}, 'got key.* at more, expected number'),
    ],
  )
  def test_leaves(self, trainer, change, message):
    for act in (trainer.put, trainer.step, trainer.losses):
      with pytest.raises(ValueError, match=f'batch: {message}'):
        act({**BATCHES[0], **change})

  def test_rows_that_the_parts_do_not_divide(self, trainer):
    with pytest.raises(ValueError, match='batch: got 3 rows, expected a multiple of 2'):
      trainer.step(toy.batch(3))
    with pytest.raises(ValueError, match='batch: got no array'):
      trainer.step({})
    assert trainer.finished == 0

  @pytest.mark.parametrize(
    ('options', 'message'),
    [
      ({'optimizer': OptimizerConfig(schedule='cosine')}, r'total_steps: got none'),
      ({'optimizer': optax.sgd(1.0), 'learning_rate': 1.0}, r'learning_rate: got one beside'),
      ({'learning_rate': [1e-3, 1e-2]}, r'learning_rate: got \[0.001, 0.01\], expected a number'),
      ({'learning_rate': 0.0}, r'learning_rate: got 0\.0, expected a number > 0'),
      ({'trainable': ('lora/x',)}, r'trainable'),
    ],
  )
  def test_options(self, base, options, message):
    with pytest.raises(ValueError, match=message):
      Trainer(base, make_lora(base), BATCHES, **options)

  @pytest.mark.parametrize('trainable', [('lora/', V), ('lora/.*lora_b',)])
  def test_several_adapters_share_all_else(self, base, trainable):
    lora = Lora.stack([make_lora(base), make_lora(base, 1)])
    with pytest.raises(ValueError, match=r"trainable: got .*expected \('lora/',\)"):
      Trainer(base, lora, BATCHES, trainable=trainable)

  def test_an_adapter_of_another_base(self, base):
    other = Base.open(BaseConfig(path='random:tiny2'), MeshConfig(fsdp=1))
    with pytest.raises(ValueError, match='belongs to another base'):
      Trainer(other, make_lora(base), BATCHES)
