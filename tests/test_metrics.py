"""The metrics file survives crashes and resumes."""

import json
import time

import pytest

from gemma_jax import metrics


def test_lines_have_the_step_first_and_plain_numbers(tmp_path):
  writer = metrics.MetricsWriter(str(tmp_path), 0)
  writer.write(1, {'loss_nats_per_token': 2.5, 'tokens': 7})
  writer.write(1, {'eval_loss_nats_per_token': 2.25})
  writer.close()
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert lines[0] == '{"step": 1, "loss_nats_per_token": 2.5, "tokens": 7}'
  assert json.loads(lines[1]) == {'step': 1, 'eval_loss_nats_per_token': 2.25}


def test_tensorboard_has_the_same_values(tmp_path):
  writer = metrics.MetricsWriter(str(tmp_path), 0)
  writer.write(3, {'loss_nats_per_token': 2.5, 'tokens': 7})
  writer.close()
  (events,) = (tmp_path / 'tensorboard').iterdir()
  content = events.read_bytes()
  assert b'train/loss_nats_per_token' in content
  assert b'train/tokens' in content


def test_a_resumed_run_drops_later_and_torn_lines(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
  metrics.MetricsWriter(str(tmp_path), 2).close()
  assert metrics.read(path) == [{'step': 1}, {'step': 2}]


def test_a_run_that_begins_anew_drops_all_lines(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 0}\n{"step": 1}\n')
  metrics.MetricsWriter(str(tmp_path), 0).close()
  assert metrics.read(path) == []


def test_a_missing_file_has_no_rows(tmp_path):
  assert metrics.read(tmp_path / 'metrics.jsonl') == []


@pytest.mark.parametrize('name', ['loss_nats_per_token', 'grad_norm'])
def test_values_that_are_not_finite_are_named(name):
  values = {
    'loss_nats_per_token': 1.0,
    'grad_norm': 1.0,
    'learning_rate': 1e-3,
    name: float('nan'),
  }
  with pytest.raises(FloatingPointError, match=f'{name}: got nan at step 5'):
    metrics.check_finite(5, values)


def test_the_wait_for_each_item_is_timed():
  def slow_second():
    yield 7, 'a'
    time.sleep(0.05)
    yield 8, 'b'

  waits, started = [], time.perf_counter()
  for wait_secs, step, name in metrics.timed(slow_second()):
    waits.append(wait_secs)
    assert (step, name) in ((7, 'a'), (8, 'b'))
    time.sleep(0.03)  # work between items is not waiting
  assert len(waits) == 2 and waits[1] >= 0.05
  assert time.perf_counter() - started - sum(waits) >= 0.06


def test_peak_memory_is_in_bytes():
  assert 1e7 < metrics.peak_memory_bytes() < 1e12
