"""Checkpoints of the trainers before there was one `Trainer`, and how they end.

Run with the code of commit 9f1bfce; no later one has `gang_run`:

    git worktree add OLD 9f1bfce
    cp tests/golden/checkpoints/make_checkpoints.py OLD/make_checkpoints.py
    cd OLD && JAX_PLATFORMS=cpu python make_checkpoints.py DIR
"""

import json
from pathlib import Path
import shutil
import sys
import tempfile

from gemma_jax.config.train import LoraConfig
from gemma_jax.runs import metrics, train
from gemma_jax.runs.evaluate import Stopped
from tests import run_toy

# Of an update, what a resumed run has to give again.
NAMES = ('step', 'loss_nats_per_token', 'grad_norm', 'learning_rate', 'supervised_tokens', 'tokens')


def configs(records):
  """(config of a run, configs of two trials), unresolved."""
  single = run_toy.config(records, steps=5, lora=LoraConfig(rank=2, targets='v', dropout=0.1))
  trials = []
  for rank, rate in ((1, 1e-2), (2, 3e-2)):
    config = run_toy.config(
      records, steps=5, seed=rank, lora=LoraConfig(rank=rank, targets='v', dropout=0.1)
    )
    config.optimizer.learning_rate = rate
    config.data.order_seed = 0
    trials.append(config)
  return single, trials


def at_step(folder, step):
  """should_stop that says yes once a metrics file has this update."""
  path = Path(folder) / 'metrics.jsonl'
  return lambda: (
    path.exists() and any(row['step'] == step and 'grad_norm' in row for row in metrics.read(path))
  )


def rows(folder):
  """The updates and evaluations of a finished run, without its times."""
  names = (*NAMES, 'eval_loss_nats_per_token', 'eval_tokens')
  read = metrics.read(Path(folder) / 'metrics.jsonl')
  return [{name: row[name] for name in names if name in row} for row in read]


def main(target):
  from gemma_jax.sweep import gang_run  # gone since; a test uses the rest of this file

  target = Path(target)
  with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    single, trials = configs(run_toy.write_records(folder))
    single, trials = single.resolve(), [config.resolve() for config in trials]
    train.train(single, str(folder / 'whole'))
    trial_folders = lambda name: [str(folder / name / f'cell{i}') for i in range(len(trials))]
    gang_run.train_gang(trials, trial_folders('whole_trials'), str(folder / 'whole_job'))
    try:
      train.train(single, str(folder / 'run'), at_step(folder / 'run', 3))
      raise AssertionError('The run was not stopped.')
    except Stopped:
      pass
    cells = trial_folders('trials')
    try:
      gang_run.train_gang(trials, cells, str(folder / 'job'), at_step(cells[0], 3))
      raise AssertionError('The job was not stopped.')
    except Stopped:
      pass
    for name in ('run', 'job'):
      (target / name / 'checkpoints').mkdir(parents=True)
      shutil.copytree(folder / name / 'checkpoints' / '3', target / name / 'checkpoints' / '3')
    shutil.copy(folder / 'run' / 'metrics.jsonl', target / 'run')
    for i, cell in enumerate(cells):
      (target / 'trials' / f'cell{i}').mkdir(parents=True)
      shutil.copy(f'{cell}/metrics.jsonl', target / 'trials' / f'cell{i}')
    expected = {
      'run': rows(folder / 'whole'),
      'trials': [rows(cell) for cell in trial_folders('whole_trials')],
    }
    (target / 'expected.json').write_text(json.dumps(expected, indent=1) + '\n')


if __name__ == '__main__':
  main(sys.argv[1])
