"""In which order things happen around the updates."""

import pytest

from gemma_jax.runs import loop, train
from gemma_jax.runs.checkpoint import Checkpoints
from gemma_jax.runs.trainer import Trainer
from tests import run_toy

pytestmark = pytest.mark.usefixtures('quick_compile')


@pytest.fixture
def events(monkeypatch):
  """What happens, in order: (what, finished updates)."""
  seen = []

  def watch(owner, name, what, step_of):
    original = getattr(owner, name)

    def watched(self, *arguments, **options):
      seen.append((what, step_of(self, *arguments)))
      return original(self, *arguments, **options)

    monkeypatch.setattr(owner, name, watched)

  watch(Trainer, 'step', 'update', lambda self, *_: self.finished + 1)
  watch(train.RunOutputs, 'updated', 'report', lambda _, metrics: metrics.step)
  watch(Trainer, 'evaluate', 'evaluate', lambda self, *_: self.finished)
  watch(Checkpoints, 'save', 'checkpoint', lambda _, state, notes: int(state.step))
  watch(train.RunOutputs, 'finish', 'finish', lambda _, step: step)
  watch(loop.Profile, 'before', 'profile', lambda _, step: step)
  return seen


def update(step):
  return [('profile', step - 1), ('update', step), ('report', step)]


def test_evaluate_then_checkpoint_then_stop(events, tmp_path):
  """And the resumed run repeats none of it."""
  config = run_toy.config(
    run_toy.write_records(tmp_path), steps=4, eval_every_steps=2, checkpoint_every_steps=2
  ).resolve()
  last = ('checkpoint', 2)
  with pytest.raises(train.Stopped):
    train.train(config, str(tmp_path / 'run'), lambda: events[-1:] == [last])
  assert events == [('evaluate', 0), *update(1), *update(2), ('evaluate', 2), last]
  events.clear()
  result = train.train(config, str(tmp_path / 'run'))
  assert result['steps'] == 4
  assert events == [*update(3), *update(4), ('evaluate', 4), ('checkpoint', 4), ('finish', 4)]


def test_a_stop_between_checkpoints_saves(events, tmp_path):
  config = run_toy.config(
    run_toy.write_records(tmp_path), steps=3, eval_every_steps=0, checkpoint_every_steps=0
  ).resolve()
  with pytest.raises(train.Stopped):
    train.train(config, str(tmp_path / 'run'), lambda: events[-1:] == [('report', 1)])
  assert events == [('evaluate', 0), *update(1), ('checkpoint', 1)]
  events.clear()
  train.train(config, str(tmp_path / 'run'))
  assert events == [*update(2), *update(3), ('evaluate', 3), ('checkpoint', 3), ('finish', 3)]


def test_early_stopping_ends_at_the_evaluation(events, tmp_path):
  """Nothing is measured twice; checkpoint and result are those of that step."""
  config = run_toy.config(
    run_toy.write_records(tmp_path), steps=50, eval_every_steps=1, early_stopping_evals=1
  )
  config.optimizer.learning_rate = 3.0  # learns nothing but noise
  config.checkpoint_every_steps = 0
  result = train.train(config.resolve(), str(tmp_path / 'run'))
  last = result['steps']
  assert last < 50
  assert events[-4:] == [
    ('report', last),
    ('evaluate', last),
    ('checkpoint', last),
    ('finish', last),
  ]
  assert len(events) == len(set(events))
  events.clear()
  assert train.train(config.resolve(), str(tmp_path / 'run')) == result
  assert events == []
