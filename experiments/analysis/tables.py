"""A sweep's results as CSV, to be published with the claims made from them."""

import csv
from pathlib import Path

from experiments.analysis import arms, verdict
from experiments.analysis.arms import Row
from experiments.analysis.verdict import Answer
from gemma_jax.sweep.results import Sweep


def write_trials(sweep: Sweep, table: list[Row], answers: list[Answer], path: Path) -> None:
  """Writes one line per trial, under the column `cell`; losses in nats per token."""
  parts = {name: sweep.part(name) for name in ('validation', 'test')}
  chosen = {trial.name: row for row in table for trial in row.trials}
  states = verdict.states(answers)
  bound = arms.clip_norm(sweep)
  axes = sorted({name for trial in sweep.trials for name in trial.axes})
  with path.open('w', newline='', encoding='utf-8') as f:
    writer = csv.writer(f)
    writer.writerow(
      [
        'cell',
        'kind',
        *axes,
        'scale',
        'rate',
        'trainable_parameters',
        'validation_loss',
        'test_loss',
        'seconds',
        'clipped_share',
        'chosen',
        'rate_at_edge',
        'state',
        'error',
      ]
    )
    for trial in sweep.trials:
      done, row = trial.result is not None, chosen.get(trial.name)
      clipped = trial.clipped(bound)
      writer.writerow(
        [
          trial.name,
          trial.kind,
          *(trial.axes.get(name, '') for name in axes),
          trial.entry.get('scale', ''),
          trial.entry.get('rate', ''),
          trial.entry['trainable_parameters'],
          *(trial.loss(part) if done else '' for part in parts.values()),
          '' if trial.result is None else trial.result.get('seconds', ''),
          '' if clipped is None else clipped,
          int(row is not None),
          int(row.at_edge) if row else '',
          states.get(row.arm, '') if row else '',
          trial.error or '',
        ]
      )


def write_records(sweep: Sweep, path: Path) -> None:
  """Writes one line per held-out record: what it is, and its nll under every trial."""
  trials = [trial for trial in sweep.trials if trial.result is not None]
  tokens = trials[0].last[1]
  with path.open('w', newline='', encoding='utf-8') as f:
    writer = csv.writer(f)
    names = ('index', 'part', 'category')
    writer.writerow([*names, 'tokens', *(f'nll {trial.name}' for trial in trials)])
    for i, record in enumerate(sweep.heldout):
      losses = (f'{trial.last[0][i]:.9g}' for trial in trials)
      writer.writerow([*(record[n] for n in names), tokens[i], *losses])
