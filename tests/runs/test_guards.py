"""Numbers that stop a run, are left out, or are said."""

import math

import pytest

from gemma_jax.runs import guards


def line(**changes):
  return {'loss_nats_per_token': 2.5, 'grad_norm': 1.5, 'learning_rate': 1e-3, **changes}


def make_guard(max_skipped=0, skipped=None):
  return guards.Guard(max_skipped, [] if skipped is None else skipped, lambda step: [step, 11])


@pytest.mark.parametrize('name', ['loss_nats_per_token', 'grad_norm'])
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_not_finite_stops_with_step_rate_and_records(name, value):
  with pytest.raises(FloatingPointError) as e:
    make_guard().check(5, line(**{name: value}))
  assert f'{name}: got {value} at step 5' in str(e.value)
  assert '(learning rate 0.001; training records 4, 11)' in str(e.value)
  assert 'max_skipped_batches' in str(e.value)


def test_finite_lines_pass_unchanged():
  assert make_guard().check(5, line()) == line()


def test_skips_up_to_the_limit_and_then_stops(caplog):
  skipped = [2]
  guard = make_guard(3, skipped)
  written = guard.check(5, line(grad_norm=math.nan))
  assert written == {'loss_nats_per_token': 2.5, 'learning_rate': 1e-3, 'skipped_updates': 2}
  assert 'training records 4, 11' in caplog.text
  guard.check(7, line(grad_norm=math.inf))
  assert skipped == [2, 5, 7]
  with pytest.raises(FloatingPointError, match='grad_norm: got nan at step 9'):
    guard.check(9, line(grad_norm=math.nan))
  assert skipped == [2, 5, 7]


def test_many_records_are_cut_short():
  guard = guards.Guard(0, [], lambda step: list(range(1000)))
  with pytest.raises(FloatingPointError, match=r'14, 15, \.\.\.\)'):
    guard.check(1, line(grad_norm=math.nan))


def test_a_jump_of_the_loss_is_said_once_it_is_known_what_is_usual(caplog):
  guard = make_guard()
  for step in range(30):
    guard.check(step, line(loss_nats_per_token=2.5 + 0.05 * (step % 5)))
  assert not caplog.records
  guard.check(30, line(loss_nats_per_token=4.0))
  assert 'Step 30: the loss jumped to 4.000' in caplog.text
  assert 'training records 29, 11' in caplog.text


def test_the_first_losses_are_no_jump(caplog):
  guard = make_guard()
  for step, loss in enumerate([1.0, 9.0, 1.0, 9.0]):
    guard.check(step, line(loss_nats_per_token=loss))
  assert not caplog.records


def test_a_flat_loss_may_move_a_little(caplog):
  guard = make_guard()
  for step in range(30):
    guard.check(step, line())
  guard.check(30, line(loss_nats_per_token=2.9))
  assert not caplog.records


def test_an_evaluation_is_checked_without_records():
  with pytest.raises(FloatingPointError, match='eval_loss: got nan at step 3,'):
    guards.check_finite(3, {'eval_loss': math.nan})
