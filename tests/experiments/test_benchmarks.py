"""The benchmark suite on a tiny model, without the peers."""

import dataclasses
import json
from pathlib import Path
import subprocess
import sys

import numpy as np
import pytest

from experiments.benchmarks import attention, flops, jobs, protocol, table
from gemma_jax.model import variants
from tests import hf_toy, toy

ROOT = Path(__file__).parents[2]
MODEL = hf_toy.PARITY / 'gemma3'


def test_the_suite_measures_records_once_each(tmp_path):
  """Nine packed records, three updates: every target is in one of them."""
  rng = np.random.default_rng(0)
  records = tmp_path / 'records.jsonl'
  supervised = 0
  with records.open('w') as f:
    for length in (19, 23, 29, 31, 37, 41, 43, 47, 5):
      mask = (rng.random(length) < 0.5).astype(int)
      mask[-1] = 1
      supervised += int(mask[1:].sum())
      tokens = rng.integers(4, 90, length).tolist()
      record = {'tokens': tokens, 'loss_mask': mask.tolist()}
      f.write(json.dumps(record) + '\n')
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'experiments.benchmarks.run'),
      *('--suite=train', '--case=records', '--rounds=1'),
      f'--model={MODEL}',
      f'--records={records}',
      f'--output={tmp_path / "out"}',
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert '### 9 records, responses only' in done.stdout
  assert (tmp_path / 'out' / 'plot.png').stat().st_size > 1000
  found = json.loads((tmp_path / 'out' / 'results.json').read_text())
  (case,) = found['cases']
  (result,) = case['results'][jobs.OURS]
  assert result['supervised_tokens'] == supervised
  assert result['updates'] == 3
  assert result['records_per_second'] > 0
  assert found['gemm_flops_per_second'][0] > 1e9


def test_a_missing_flag_is_one_line():
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.benchmarks.run', '--suite=train'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1
  assert done.stderr == 'error: --model: missing, expected a value; see --help\n'


def test_cases_have_the_same_work_for_all(tmp_path):
  inputs = jobs.Inputs(model='M', gguf='G', records='', folder=str(tmp_path), vocab_size=101)
  for suite in ('train', 'memory', 'decode', 'large'):
    for case in jobs.SUITES[suite](inputs):
      programs = [program for _, program, _ in case.jobs]
      assert programs[0] == 'ours'
      assert len(programs) > 1
      for _, program, job in case.jobs:
        job = {k: v for k, v in job.items() if k not in ('weights', 'model')}
        first = case.jobs[0][2]
        assert job == {k: first[k] for k in job}, program


def test_batches_are_padded_to_their_longest(tmp_path):
  path = tmp_path / 'records.jsonl'
  path.write_text(
    '{"tokens": [2, 5, 6], "loss_mask": [1, 0, 1]}\n{"tokens": [2, 7]}\n{"tokens": [2, 8, 9, 1]}\n'
  )
  job = {'records': str(path), 'batch_size': 2, 'steps': 0}
  (ids, is_real, mask), last = protocol.batches(job)
  np.testing.assert_array_equal(ids, [[2, 5, 6], [2, 7, 0]])
  np.testing.assert_array_equal(is_real, [[1, 1, 1], [1, 1, 0]])
  np.testing.assert_array_equal(mask, [[0, 0, 1], [0, 1, 0]])
  assert last[0].shape == (1, 4)
  assert len(list(protocol.batches({**job, 'steps': 1}))) == 1


def test_speed_leaves_out_the_first_update(tmp_path):
  path = tmp_path / 'records.jsonl'
  path.write_text('{"tokens": [2, 5]}\n' * 8)
  job = {'records': str(path), 'batch_size': 2, 'steps': 0}
  summed = protocol.summarize_training(
    job, [90.0, 1.0, 1.0, 4.0], [10, 20, 30, 40], 7, [3.0, 2.5, 2.0, 1.5], 95.0
  )
  assert summed['records_per_second'] == pytest.approx(6 / 6)
  assert summed['tokens_per_second'] == pytest.approx(90 / 6)
  fixed = protocol.summarize_training(
    {**job, 'steps': 4}, [90.0, 1.0, 2.0, 4.0], [12, 12, 12, 12], 7, [3.0, 2.5, 2.0, 1.5], 95.0
  )
  assert fixed['step_seconds'] == 2.0
  assert fixed['tokens_per_second'] == pytest.approx(6.0)


def test_ratios_say_how_much_better():
  labels = (jobs.OURS, jobs.HF, jobs.KERAS_HUB)
  results = {
    label: [{'x': value, 'peak_gib': 1.0} for value in values]
    for label, values in zip(labels, ([5.0, 6.0, 9.0], [2.0, 3.0, 7.0], []), strict=True)
  }
  case = jobs.Case('c', 'x', True, tuple((n, 'p', {}) for n in labels))
  ours, peer = table.rows(case, results)
  assert (ours['median'], ours['low'], ours['high']) == (6.0, 5.0, 9.0)
  assert (ours['ratio'], peer['ratio']) == (2.0, 1.0)
  smaller = dataclasses.replace(case, larger_is_better=False)
  assert table.rows(smaller, results)[0]['ratio'] == 0.5
  assert '| gemma_jax | 6 | 5 to 9 | 3 | 2.00 |' in table.markdown(case, results)


def test_flops_of_a_step():
  config = variants.get('gemma3_270m')
  kernels = 268_098_176 - 262_144 * 640 - 640 - 18 * (4 * 640 + 2 * 256)
  base = flops.train_flops(config, 1, 1, 0)
  # A token alone sees itself: two products of L N H, three times.
  assert base == 4 * kernels + 3 * 4 * 18 * 4 * 256
  loss = flops.train_flops(config, 1, 1, 1) - base
  assert loss == 4 * 262_144 * 640
  # Windows of 4 in two of three layers: 4 + 4 + 4 ... instead of all before.
  seen = [
    flops.train_flops(c, 1, 9, 0)
    for c in (toy.FULL, dataclasses.replace(toy.FULL, layer_is_local=None))
  ]
  missed = sum(max(0, i + 1 - 4) for i in range(9))
  assert seen[1] - seen[0] == 3 * 4 * 2 * missed * 10 * 14


@pytest.mark.parametrize('segments', ['packed', 'full'])
def test_attention_is_timed_by_both_kernels(segments):
  measured = attention.measure(160, segments, 64, repeats=1)
  assert measured['milliseconds'].keys() == {'einsum', 'blocks'}
  assert measured['ratio'] > 0


def test_packed_rows_hold_several_segments():
  ids, positions = attention.packed(1024)
  assert ids.shape == positions.shape == (1, 1024)
  starts = np.flatnonzero(np.diff(ids[0])) + 1
  assert len(starts) > 3
  np.testing.assert_array_equal(np.flatnonzero(positions[0] == 0)[1:], starts)
