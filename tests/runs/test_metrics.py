"""The metrics file survives crashes and resumes."""

import json
import struct
import threading

from tensorboardX.proto import event_pb2

from gemma_jax.runs import metrics


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


def test_stray_lines_are_set_aside_and_said(tmp_path, caplog):
  path = tmp_path / 'metrics.jsonl'
  stray = b'\xff\xfe\n[1]\n{"step": "x"}\n\n'
  path.write_bytes(b'{"step": 1}\n' + stray + b'{"step": 2}\n{"ste')
  metrics.MetricsWriter(str(tmp_path), 2).close()
  assert metrics.read(path) == [{'step': 1}, {'step': 2}]
  assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
  assert (tmp_path / 'metrics.jsonl.set_aside').read_bytes() == stray
  assert '4 lines are no metrics; set aside in' in caplog.text
  with path.open('ab') as f:
    f.write(b'more\n')
  metrics.MetricsWriter(str(tmp_path), 2).close()
  assert (tmp_path / 'metrics.jsonl.set_aside').read_bytes() == stray + b'more\n'


def test_a_run_that_begins_anew_drops_all_lines(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 0}\n{"step": 1}\n')
  metrics.MetricsWriter(str(tmp_path), 0).close()
  assert metrics.read(path) == []


def test_a_missing_file_has_no_rows(tmp_path):
  assert metrics.read(tmp_path / 'metrics.jsonl') == []


def test_peak_memory_is_in_bytes():
  assert 1e7 < metrics.peak_memory_bytes() < 1e12


def test_tensorboard_is_readable_while_it_is_written(tmp_path):
  writer = metrics.MetricsWriter(str(tmp_path), 6)
  writer.write(7, {'loss_nats_per_token': 2.5})
  writer.flush()
  (events,) = read_events(tmp_path)
  writer.close()
  assert events == [('train/loss_nats_per_token', 7, 2.5)]


def test_no_thread_writes(tmp_path):
  before = threading.active_count()
  writer = metrics.MetricsWriter(str(tmp_path), 0)
  writer.write(1, {'loss_nats_per_token': 2.5})
  assert threading.active_count() == before
  writer.close()


def read_events(workdir):
  """(tag, step, value) of each event file, and that later files purge."""
  boards = []
  for path in sorted((workdir / 'tensorboard').iterdir()):
    content, events = path.read_bytes(), []
    while content:
      (size,) = struct.unpack('<Q', content[:8])
      event = event_pb2.Event.FromString(content[12 : 12 + size])
      content = content[16 + size :]
      events += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    boards.append(events)
  return boards
