"""Two thousand updates hold no more memory and files than a hundred."""

import os
from pathlib import Path
import statistics

import pytest

from gemma_jax.runs import metrics, train
from tests import run_toy
from tests.runs.test_metrics import read_events

STEPS = 2000
SETTLED = 500  # updates after which nothing may grow


def resources():
  """(resident bytes, open files, threads) of this process."""
  resident = int(Path('/proc/self/statm').read_text().split()[1])
  return (
    resident * os.sysconf('SC_PAGE_SIZE'),
    len(os.listdir('/proc/self/fd')),
    len(os.listdir('/proc/self/task')),
  )


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self').exists(), reason='needs /proc')
def test_nothing_grows_and_what_is_written_can_be_read(tmp_path):
  workdir = tmp_path / 'run'
  config = run_toy.config(
    run_toy.write_records(tmp_path), steps=STEPS, eval_every_steps=100, checkpoint_every_steps=50
  ).resolve()
  samples = {}

  def look():
    rows = metrics.read(workdir / 'metrics.jsonl')
    step = rows[-1]['step'] if rows else 0
    if step % 20 == 0 and step not in samples:
      samples[step] = resources()
    if step % 500 == 250:  # while it is written
      assert [r['step'] for r in rows if 'grad_norm' in r] == list(range(1, step + 1))
      assert read_events(workdir)
    return False

  train.train(config, str(workdir), look)
  early = [x for step, x in samples.items() if SETTLED <= step < 2 * SETTLED]
  late = [x for step, x in samples.items() if step >= STEPS - SETTLED]
  assert len(early) > 10
  assert len(late) > 10
  for i, (name, slack) in enumerate((('bytes', 32 << 20), ('files', 2), ('threads', 2))):
    before, after = (statistics.median(x[i] for x in s) for s in (early, late))
    print(f'{name}: {before:,} at {SETTLED}-{2 * SETTLED}, {after:,} at the end')
    assert after <= before + slack, name
