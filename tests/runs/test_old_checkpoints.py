"""Checkpoints of the version with two trainers go on in this one."""

import json
from pathlib import Path
import shutil

import pytest

from gemma_jax.formats import adapter
from gemma_jax.model import variants
from gemma_jax.runs import metrics, train
from gemma_jax.sweep import trials
from tests import run_toy, toy
from tests.golden.checkpoints import make_checkpoints as made

GOLDEN = Path(made.__file__).parent


@pytest.fixture
def old(tmp_path):
  """(folder of the checkpoints, config of the run, configs of the trials)."""
  folder = tmp_path / 'old'
  shutil.copytree(GOLDEN, folder)
  single, of_trials = made.configs(run_toy.write_records(tmp_path))
  return folder, single.resolve(), [config.resolve() for config in of_trials]


def check(folder, expected, first=3):
  """Metrics as the old version gave them, had it not been stopped.

  The scale was a constant of its step, which moves the last bit.
  """
  got = made.rows(folder)
  assert len(got) == len(expected)
  for mine, want in zip(got, expected, strict=True):
    assert mine.keys() == want.keys()
    if want['step'] <= first:  # written by the old version
      assert mine == want
    toy.assert_close(mine, want, 1e-6)


def test_a_run_goes_on(old, caplog):
  folder, config, _ = old
  expected = json.loads((GOLDEN / 'expected.json').read_text())['run']
  result = train.train(config, str(folder / 'run'))
  assert 'equal bits' not in caplog.text  # it does not say what it was made with
  check(folder / 'run', expected)
  losses = {r['step']: r['eval_loss_nats_per_token'] for r in expected if 'eval_tokens' in r}
  assert result['steps'] == 5
  assert result['tokens'] == sum(r['tokens'] for r in expected if 'tokens' in r)
  assert result['loss_base'] == losses[0]
  toy.assert_close(result['loss_adapted'], losses[5], 1e-6)
  assert adapter.read(result['adapter'], variants.get('tiny3')).config.rank == 2


def test_trials_go_on(old, caplog):
  folder, _, configs = old
  expected = json.loads((GOLDEN / 'expected.json').read_text())['trials']
  cells = [folder / 'trials' / f'cell{i}' for i in range(2)]
  caplog.set_level('INFO')
  trials.train_batched(configs, [str(cell) for cell in cells], str(folder / 'job'))
  assert 'Resumed 2 trials from step 3' in caplog.text
  for cell, rows, config in zip(cells, expected, configs, strict=True):
    check(cell, rows)
    result = json.loads((cell / 'result.json').read_text())
    assert (result['steps'], result['gang_size']) == (5, 2)
    assert metrics.read(cell / 'metrics.jsonl')[-1]['step'] == 5
    lora = adapter.read(cell / 'adapter', variants.get('tiny3'))
    assert lora.config.rank == config.lora.rank
