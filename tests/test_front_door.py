"""The front door, as a user of the package meets it.

Every submodule is imported first: from then on a door that had the name of a
room would be the room.
"""

import functools
import importlib
import os
from pathlib import Path
import pkgutil
import re
import signal
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gemma_jax as gj
from gemma_jax import pytree
from gemma_jax.runs.program import Program
from gemma_jax.training import step as step_lib
from gemma_jax.training.state import init_state, split
from tests import toy

pytestmark = pytest.mark.usefixtures('quick_compile', 'every_submodule')

ROOT = Path(__file__).parents[1]
DOORS = sorted(set(gj.__all__) - {'__version__'})

# Packages of extras, without which a module may say so.
EXTRAS = ('tensorflow_datasets', 'h5py', 'huggingface_hub', 'matplotlib', 'scipy', 'libtpu')


@pytest.fixture(scope='module')
def every_submodule():
  names = [m.name for m in pkgutil.walk_packages(gj.__path__, 'gemma_jax.')]
  assert len(names) > 80
  for name in names:
    try:
      importlib.import_module(name)
    except ImportError as e:
      assert (e.name or '').split('.')[0] in EXTRAS, f'{name}: {e}'


def load(**settings):
  return gj.load('random:tiny3', **settings)


@pytest.fixture(scope='module')
def base(every_submodule):
  return load(mesh=gj.MeshConfig(fsdp=1))


@pytest.fixture(scope='module')
def lora(base):
  return gj.Lora.init(base, rank=3, targets='all')


@pytest.fixture(scope='module')
def records():
  ask = 'Where is the {}?'
  return [{'prompt': ask.format(i), 'response': f'On line {i % 5}.'} for i in range(12)]


@pytest.fixture(scope='module')
def data(base, records):
  return gj.Dataset(records[:9], base, heldout=records[9:], seq_len=64)


def batch(seed, rows=4, length=11):
  return jax.device_get(toy.batch(rows, length, seed, vocab_size=260))


class Stream:
  """Batches without end that know where they are."""

  def __init__(self, **shape):
    self.at = 0
    self.shape = shape

  def __iter__(self):
    return self

  def __next__(self):
    self.at += 1
    return batch(self.at, **self.shape)

  def state(self):
    return {'at': self.at}

  def restore(self, state):
    self.at = state['at']


def surprise(model, variables, batch, key):
  """A loss of one's own: squared losses of rows, and a metric."""
  losses = model.token_losses(variables, batch, key).sum(-1)
  rows = jnp.float32(len(losses))
  return jnp.sum(losses**2) / 100, rows, {'hard': (jnp.sum(losses > 40.0), rows)}


def trainer_of(base, lora, data=None, **settings):
  settings = {'learning_rate': 1e-2} | settings
  return gj.Trainer(base, lora, Stream() if data is None else data, **settings)


def losses(metrics):
  return [m.loss for m in metrics]


def test_no_door_has_the_name_of_a_room():
  assert set(DOORS) <= set(dir(gj))
  for name in DOORS:
    door = getattr(gj, name)
    assert callable(door) and not isinstance(door, types.ModuleType), name
    assert not (ROOT / 'gemma_jax' / name).exists()
  with pytest.raises(AttributeError, match="'gemma_jax' has no attribute 'lode'"):
    gj.lode  # noqa: B018


def test_importing_it_does_not_import_jax():
  program = 'import sys, gemma_jax; dir(gemma_jax); print("jax" in sys.modules)'
  assert in_a_process(program, ROOT) == 'False'


def in_a_process(program, folder, **environ):
  """What a program prints, in a process with one device."""
  ran = subprocess.run(
    [sys.executable, '-c', program],
    cwd=folder,
    env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'} | environ,
    capture_output=True,
    text=True,
    check=False,
  )
  assert ran.returncode == 0, ran.stderr
  return ran.stdout.strip()


def example():
  """The code of the package's docstring, as it stands."""
  (code,) = re.findall(r'^    import gemma_jax as gj\n(?:    .*\n|\n)+', gj.__doc__, re.M)
  return textwrap.dedent(code).strip()


def check_example(printed, folder, steps):
  *updates, answer_or_loss = printed.splitlines()
  assert [int(x.split()[0]) for x in updates[:steps]] == list(range(1, steps + 1))
  assert np.isfinite(float(answer_or_loss))
  assert (folder / 'my_adapter' / 'adapter_model.safetensors').is_file()


def test_the_example_runs(tmp_path):
  assert len(re.findall('gemma3_270m', example())) == 1
  code = example().replace('gemma3_270m', 'random:tiny3')
  check_example(in_a_process(code, tmp_path), tmp_path, 20)


@pytest.mark.real
@pytest.mark.slow
def test_the_example_runs_on_the_real_model(tmp_path):
  printed = in_a_process(example().replace('steps=20', 'steps=2'), tmp_path)
  check_example(printed, tmp_path, 2)
  assert float(printed.splitlines()[-1]) < 5


def test_the_readme_has_the_same_example():
  assert f'```python\n{example()}\n```' in (ROOT / 'README.md').read_text('utf-8')


def test_every_door_opens(base, data, tmp_path):
  assert isinstance(base, gj.Base)
  config = gj.LoraConfig(rank=2, targets='q')
  optimizer = gj.OptimizerConfig(learning_rate=1e-2, clip_norm=0.0)
  trainer = gj.Trainer(
    base, gj.Lora.init(base, config), data, batch_size=2, optimizer=optimizer, loss_fn=gj.token_loss
  )
  measured = trainer.evaluate().nll_per_token
  seen = list(trainer.run(steps=3))
  assert [m.step for m in seen] == [1, 2, 3] and trainer.finished == 3
  assert np.isclose(gj.evaluate(base, data).nll_per_token, measured, rtol=1e-6)
  after = gj.evaluate(base, data.heldout, lora=trainer.lora, seq_len=64).nll_per_token
  assert after < measured
  folder = str(tmp_path / 'adapter')
  trainer.lora.save(folder)
  again = gj.Lora.load(folder, base)
  toy.assert_equal(again.factors, trainer.lora.factors)
  asked = 'Where is the 7?', 'And 8?'
  answers = gj.generate(base, asked, lora=again, max_new_tokens=5)
  assert answers == gj.generate(base, asked, lora=trainer.lora, max_new_tokens=5)
  assert answers[0] == gj.generate(base, asked[0], lora=again, max_new_tokens=5)
  # Records and messages are asked as training renders them.
  asked = [{'role': 'system', 'content': 'S'}, {'role': 'user', 'content': 'Q'}]
  rendered = ['Q', 'S\n\nQ\n\nContext:\nC', 'S\n\nQ']
  rendered = [f'Instruction:\n{text}\n\nResponse:\n' for text in rendered]
  row = {'instruction': 'Q', 'context': 'C', 'system': 'S', 'response': 'not shown'}
  want = gj.generate(base, rendered, template='plain', max_new_tokens=5)
  assert gj.generate(base, ['Q', row, asked], max_new_tokens=5) == want
  assert gj.generate(base, [asked], max_new_tokens=5) == want[2:]
  assert gj.generate(base, asked, max_new_tokens=5) == want[2]
  assert gj.generate(base, row, max_new_tokens=5) == want[1]
  said_less = gj.generate(base, 'Q', max_new_tokens=40, repetition_penalty=50.0)
  assert said_less != gj.generate(base, 'Q', max_new_tokens=40)
  made = gj.convert('random:tiny3', str(tmp_path / 'merged'), 'hf', adapter=folder, verify=False)
  merged = gj.load(made['output'], mesh=gj.MeshConfig(fsdp=1))
  toy.assert_close(merged.params, again.merge(base.params), 1e-6)


# What a user gets wrong first → what is said.


def test_an_unknown_model():
  with pytest.raises(ValueError, match=r'gemma3_720m.*expected.*gemma3_270m'):
    gj.load('gemma3_720m')


@pytest.mark.parametrize(
  'records, message',
  [
    ([{'question': 'Where?', 'reply': 'Here.'}], r'records\[0\]: .*question.* needs one of'),
    ([{'prompt': '?', 'response': '!'}, {'prompt': '?', 'response': 7}], r'records\[1\]: .*int 7'),
    (['Where?'], r"records\[0\]: not an object .*'Where\?'"),
    ([], 'records: .* is empty'),
    ('no_such_file.jsonl', r'data\.path: got .* expected a \.jsonl'),
  ],
)
def test_records_of_no_known_form(base, records, message):
  with pytest.raises(ValueError, match=message):
    gj.Dataset(records, base)


@pytest.mark.parametrize(
  'asked, message',
  [
    (['Why?', {'question': 'Why?'}], r'prompt 1: field "instruction" is missing .*needs no resp'),
    ([{'role': 'user', 'content': 'a'}] * 2, 'prompt 0: field "messages" must hold'),
    ({'prompt': 'a', 'history': [['b', 'c']]}, "'dolly' for a conversation of 3 turns"),
    ([], 'prompts: got none'),
    (7, 'prompts: got .*expected a question, or a list'),
  ],
)
def test_questions_of_no_known_form(base, asked, message):
  with pytest.raises(ValueError, match=message):
    gj.generate(base, asked)


def test_an_adapter_of_another_base(base, data, lora):
  other = gj.Lora.init(gj.load('random:tiny', mesh=gj.MeshConfig(fsdp=1)), rank=3, targets='all')
  for use in (
    lambda: trainer_of(base, other),
    lambda: gj.generate(base, 'Where?', lora=other),
    lambda: gj.evaluate(base, data, lora=other),
  ):
    with pytest.raises(ValueError, match=r'lora: got .*; it belongs to another base'):
      use()


def test_an_adapter_of_another_form(base, data, lora):
  unrolled = load(scan_layers=False, mesh=gj.MeshConfig(fsdp=1))
  for use in (
    lambda: trainer_of(unrolled, lora),
    lambda: gj.generate(unrolled, 'Where?', lora=lora),
    lambda: gj.evaluate(unrolled, data, lora=lora),
  ):
    with pytest.raises(ValueError, match=r'lora: got .* whose scan_layers differs'):
      use()


@pytest.mark.parametrize(
  'returned, message',
  [
    (
      lambda x: x.sum(),
      r'loss_fn: got an array \[\] of float32, expected \(sum, weight, metrics\)',
    ),
    (lambda x: (x.sum(), 1.0), 'loss_fn: got a tuple of 2, expected'),
    (lambda x: (x, 1.0, {}), r'loss_fn: got an array \[4, 11\] of float32 for the sum, expected'),
    (lambda x: (x.sum(), 1.0, {'a': x.sum()}), r"loss_fn: got an array \[\] .* the metric 'a'"),
    (lambda x: (x.sum(), 1.0, {'loss': (x.sum(), 1.0)}), "loss_fn: got a metric named 'loss'"),
    (lambda x: None, 'loss_fn: got NoneType, expected'),
  ],
)
def test_a_loss_that_returns_something_else(base, lora, returned, message):
  def loss_fn(model, variables, batch, key):
    return returned(model.token_losses(variables, batch, key))

  with pytest.raises(ValueError, match=message):
    trainer_of(base, lora, loss_fn=loss_fn).step(batch(0))


def test_a_batch_of_another_shape_is_compiled_anew(base, lora, monkeypatch):
  compiled = []
  compile_train_step = Program.compile_train_step
  monkeypatch.setattr(
    Program,
    'compile_train_step',
    lambda self, batch: compiled.append(batch) or compile_train_step(self, batch),
  )
  trainer = trainer_of(base, lora)
  for length in (11, 7, 11, 7):
    assert np.isfinite(trainer.step(batch(0, length=length)).loss)
  assert [x['tokens'].shape for x in compiled] == [(4, 11), (4, 7)]
  assert trainer.finished == 4


@pytest.mark.parametrize(
  'change, message',
  [
    ({'tokens': np.zeros((4, 11), np.float32)}, 'batch: got float32 at tokens, expected integer'),
    ({'weights': np.ones((4, 11), np.int32)}, 'batch: got int32 at weights, expected floating'),
    ({'more': np.zeros(3)}, 'batch: got different numbers of rows'),
    ({'more': [1, 2, 3, 4]}, 'batch: got a scalar at more/0, expected an array'),
    ({'more': 'a text'}, 'batch: got .* at more, expected an array'),
  ],
)
def test_a_batch_of_another_dtype_or_structure(base, lora, change, message):
  trainer = trainer_of(base, lora)
  with pytest.raises(ValueError, match=message):
    trainer.step(batch(0) | change)
  incomplete = {k: x for k, x in batch(0).items() if k != 'targets'}
  with pytest.raises(ValueError, match=r"batch: got .*, expected also \['targets'\]; data.exam"):
    trainer.step(incomplete)
  assert trainer.finished == 0


def test_rows_that_the_parts_do_not_divide(base, lora, data):
  with pytest.raises(ValueError, match='batch: got 3 rows, expected a multiple of 2: accumulate'):
    trainer_of(base, lora, accumulate_steps=2).step(batch(0, rows=3))
  for batch_size, parts in ((3, 2), (0, 2), (-2, 2)):
    with pytest.raises(ValueError, match=f'batch_size: got {batch_size}, expected'):
      trainer_of(base, lora, data, accumulate_steps=parts, batch_size=batch_size)
  with pytest.raises(ValueError, match='accumulate_steps: got 0, expected an integer >= 1'):
    trainer_of(base, lora, data, accumulate_steps=0)


def test_settings_that_make_no_sense(base, lora, data, tmp_path):
  refused = functools.partial(pytest.raises, ValueError)
  with refused(match='data: got list beside a workdir, expected a Dataset, or an iterable'):
    trainer_of(base, lora, [batch(0)], workdir=str(tmp_path / 'a'))
  cosine = gj.OptimizerConfig(schedule='cosine')
  with refused(match="total_steps: got none, expected .*schedule='cosine'"):
    trainer_of(base, lora, optimizer=cosine, learning_rate=None)
  with refused(match='learning_rate: got one beside an optimizer of your own'):
    trainer_of(base, lora, optimizer=optax.sgd(1.0))
  with refused(match='learning_rate: got .*, expected a number'):
    trainer_of(base, lora, learning_rate=[1e-3, 1e-2])
  with refused(match='optimizer.learning_rate: got 0'):
    trainer_of(base, lora, learning_rate=0)
  with refused(match="trainable: 'loar/' matches no leaf"):
    trainer_of(base, lora, trainable=['loar/'])
  with refused(match='save_every_steps: got 0'):
    trainer_of(base, lora, data, workdir=str(tmp_path / 'b'), save_every_steps=0)
  trainer = trainer_of(base, lora, optimizer=cosine, total_steps=3)
  with refused(match='steps: got 0, expected an integer >= 1'):
    trainer.run(steps=0)
  with refused(match='steps: got 4 after 0, expected at most 3'):
    trainer.run(steps=4)
  with refused(match='data: got none, expected a Dataset or batches'):
    trainer.evaluate()


# What a notebook does.


def test_a_run_goes_on_after_a_stop(base, lora, data):
  whole = trainer_of(base, lora, data)
  stopped = trainer_of(base, lora, data)
  want = losses(whole.run(steps=5))
  got = []
  for metrics in stopped.run(steps=4):
    got.append(metrics.loss)
    if metrics.step == 2:
      break
  assert stopped.finished == 2
  assert got + losses(stopped.run(steps=3)) == want
  toy.assert_equal(stopped.lora.factors, whole.lora.factors)


def test_data_that_end_end_the_run(base, lora):
  trainer = trainer_of(base, lora, [batch(0), batch(1)])
  assert len(list(trainer.run(steps=5))) == trainer.finished == 2


def test_what_was_given_and_taken_stays_whole(base, lora, data):
  before = jax.device_get(lora.factors)
  trainer = trainer_of(base, lora, data)
  trainer.step(next(Stream()))
  early = trainer.lora
  kept = jax.device_get(early.factors)
  list(trainer.run(steps=2))
  toy.assert_equal(jax.device_get(early.factors), kept)
  toy.assert_equal(jax.device_get(lora.factors), before)
  gj.evaluate(base, data, lora=early)
  with pytest.raises(AssertionError):
    toy.assert_equal(jax.device_get(trainer.lora.factors), kept)


def test_ctrl_c_during_an_update(base, lora, ctrl_c, tmp_path):
  """SIGINT comes from a thread of the device, while it computes the 2nd update."""
  calls = []

  def interrupt(weight):
    calls.append(weight)
    if len(calls) == 2:
      os.kill(os.getpid(), signal.SIGINT)

  def loss_fn(model, variables, batch, key):
    jax.debug.callback(interrupt, batch['weights'].sum())
    return gj.token_loss(model, variables, batch, key)

  want = losses(trainer_of(base, lora).run(steps=4))
  trainer = trainer_of(base, lora, loss_fn=loss_fn, workdir=str(tmp_path))
  got = []
  with pytest.raises(KeyboardInterrupt):
    for metrics in trainer.run(steps=4):
      got.append(metrics.loss)
  assert trainer.finished == 2 and len(got) == 1
  assert all(np.all(np.isfinite(x)) for _, x in pytree.items(trainer.lora.factors))
  toy.assert_close(got + losses(trainer.run(steps=2)), [want[0], *want[2:]], 1e-6)


@pytest.mark.parametrize('kind', ['dataset', 'stream'])
def test_resumes_bit_for_bit(base, lora, data, tmp_path, kind):
  make = functools.partial(trainer_of, base, lora, save_every_steps=2)
  source = lambda: data if kind == 'dataset' else Stream()
  whole = make(source())
  want = losses(whole.run(steps=6))
  first = make(source(), workdir=str(tmp_path))
  assert losses(first.run(steps=3)) == want[:3]
  del first  # the notebook's kernel was started anew
  again = make(source(), workdir=str(tmp_path))
  assert again.finished == 3
  assert losses(again.run(steps=3)) == want[3:]
  toy.assert_equal(again.lora.factors, whole.lora.factors)


def test_a_workdir_of_another_trainer(base, lora, data, tmp_path):
  workdir = str(tmp_path)
  make = functools.partial(trainer_of, base, data=data, workdir=workdir)
  trainer = make(lora)
  next(iter(trainer.run(steps=1)))
  with pytest.raises(ValueError, match=r'was made with learning_rate=0\.01, this trainer has 0.03'):
    make(lora, learning_rate=0.03)
  with pytest.raises(ValueError, match=r'was made with lora=.*rank=3.* has .*rank=2'):
    make(gj.Lora.init(base, rank=2))
  (metrics,) = trainer.run(steps=1)  # still its own
  assert metrics.step == 2
  del trainer
  with pytest.raises(ValueError, match='was made with learning_rate=') as refused:
    make(lora, learning_rate=0.03)
  assert refused.tb  # the traceback, which a notebook keeps, does not keep the workdir
  assert make(lora).finished == 2


def test_a_cell_that_is_run_again_takes_the_workdir_over(base, lora, data, tmp_path):
  """The name `trainer` still holds the former one while the later is made."""
  make = functools.partial(trainer_of, base, lora, data, workdir=str(tmp_path))
  former = make()
  next(iter(former.run(steps=2)))
  later = make()
  assert later.finished == 1
  with pytest.raises(ValueError, match='a later trainer has taken it over'):
    former.run(steps=1)
  assert [m.step for m in later.run(steps=1)] == [2]
  assert make().finished == 2


# A loss of one's own.


def assert_same_training(one, other, steps=3, **shape):
  """Losses, metrics and factors of two trainers on the same batches."""
  for i in range(steps):
    a, b = one.step(batch(i, **shape)), other.step(batch(i, **shape))
    assert np.isclose(a.loss, b.loss, rtol=1e-5) and a.weight == b.weight
    assert a.more.keys() == b.more.keys()
    toy.assert_close(dict(a.more), dict(b.more), 1e-5)
  toy.assert_close(jax.device_get(one.lora.factors), jax.device_get(other.lora.factors), 1e-5)


def own_loss(base, lora, **settings):
  # Momentum, not Adam, which would make gradients near zero as large as others.
  settings = {'optimizer': optax.sgd(1e-2, momentum=0.9), 'learning_rate': None} | settings
  return trainer_of(base, lora, loss_fn=surprise, **settings)


def test_own_loss_in_four_parts(base, lora):
  assert_same_training(own_loss(base, lora), own_loss(base, lora, accumulate_steps=4), rows=8)


def test_own_loss_on_eight_devices(base, lora):
  eight = load(mesh=gj.MeshConfig(data=4, fsdp=2))
  assert eight.mesh.size == 8
  assert_same_training(own_loss(base, lora), own_loss(eight, lora), rows=8)


def test_own_loss_of_two_adapters_at_once(base, lora):
  members, rates = [lora, gj.Lora.init(base, rank=2, targets='qv', seed=1)], [1e-2, 3e-2]
  make = functools.partial(own_loss, base, optimizer=None)
  together = make(gj.Lora.stack(members), learning_rate=rates)
  alone = [make(each, learning_rate=rate) for each, rate in zip(members, rates, strict=True)]
  for i in range(3):
    metrics = together.step(batch(i))
    for k, trainer in enumerate(alone):
      mine, want = metrics.of_member(k), trainer.step(batch(i))
      toy.assert_close([mine.loss, mine.more['hard']], [want.loss, want.more['hard']], 1e-5)
  for got, trainer in zip(together.lora.members(), alone, strict=True):
    want = dict(pytree.items(trainer.lora.factors))
    got = {name: x for name, x in pytree.items(got.factors) if name in want}
    toy.assert_close(got, want, 1e-5)


def test_own_loss_is_what_evaluation_measures(base, lora, data):
  trainer = own_loss(base, lora, data=data)
  measured = trainer.evaluate()
  assert measured.keys() == {'loss', 'weight', 'hard'}
  rows = sum(len(b['tokens']) for b, _ in data.eval_batches(4))
  assert measured['weight'] == rows
  with_iterable = trainer.evaluate([b for b, _ in data.eval_batches(4)])
  assert with_iterable == measured


def test_own_loss_that_is_not_finite_is_skipped(base, lora):
  """Weights and moments stay; the step is counted, as the schedule needs it."""

  def loss_fn(model, variables, batch, key):
    total, weight, metrics = surprise(model, variables, batch, key)
    return total * batch['factor'].sum(), weight, metrics

  tx = optax.adam(1e-2)
  step = step_lib.make_train_step(base.model, loss_fn, lambda rate: (tx, None))
  leaves, frozen = split({'params': base.params, 'lora': lora.factors}, ('lora/',))
  hyper = step_lib.Hyperparameters(jnp.asarray(lora.scale))
  step = jax.jit(step)
  good, bad = ({**batch(0), 'factor': np.full(4, x, np.float32)} for x in (0.25, np.inf))
  first, _ = step(init_state(leaves, tx), hyper, frozen, good)
  second, metrics = step(first, hyper, frozen, bad)
  assert not np.isfinite(metrics['loss']) and second.step == 2
  toy.assert_equal(second.trainable, first.trainable)
  third, metrics = step(second, hyper, frozen, good)
  assert np.isfinite(metrics['loss']) and third.step == 3


def scaled(factor, model, variables, batch, key):
  total, weight, metrics = gj.token_loss(model, variables, batch, key)
  return factor * total, weight, metrics


def test_a_partial_is_a_loss(base, lora, data, tmp_path):
  """Also beside a workdir, whose trainers are told apart by their losses."""
  make = lambda factor: trainer_of(
    base, lora, data, loss_fn=functools.partial(scaled, factor), workdir=str(tmp_path)
  )
  trainer = make(0.5)
  assert np.isfinite(next(iter(trainer.run(steps=1))).loss)
  del trainer
  with pytest.raises(ValueError, match=r'was made with loss_fn=.*scaled .*, this trainer has'):
    make(0.7)


def test_an_optimizer_is_told_from_another(base, lora, data, tmp_path):
  make = lambda rate: trainer_of(
    base, lora, data, optimizer=optax.adam(rate), workdir=str(tmp_path), learning_rate=None
  )
  next(iter(make(1e-3).run(steps=1)))
  assert make(1e-3).finished == 1
  with pytest.raises(ValueError, match=r'was made with optimizer=.*, this trainer has'):
    make(1e-1)


def test_rates_may_be_an_array(base, lora, data, tmp_path):
  several = gj.Lora.stack([lora, lora])
  trainer = trainer_of(
    base, several, data, learning_rate=np.array([1e-3, 1e-2]), workdir=str(tmp_path)
  )
  (metrics,) = trainer.run(steps=1)
  np.testing.assert_allclose(metrics.learning_rate, [1e-3, 1e-2], rtol=1e-6)
