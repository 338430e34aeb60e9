"""A sweep's results as CSV, to be published with what is said of them."""

import csv
from pathlib import Path

from experiments.analysis import arms, verdict
from experiments.analysis.arms import Row
from experiments.analysis.verdict import Answer
from gemma_jax.sweep.results import Sweep


def write_cells(sweep: Sweep, table: list[Row], answers: list[Answer], path: Path) -> None:
  """A line a cell; losses in nats per token."""
  parts = {name: sweep.part(name) for name in ('validation', 'test')}
  chosen = {cell.name: row for row in table for cell in row.cells}
  states = verdict.states(answers)
  bound = arms.clip_norm(sweep)
  axes = sorted({name for cell in sweep.cells for name in cell.axes})
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
    for cell in sweep.cells:
      done, row = cell.result is not None, chosen.get(cell.name)
      clipped = cell.clipped(bound)
      writer.writerow(
        [
          cell.name,
          cell.kind,
          *(cell.axes.get(name, '') for name in axes),
          cell.entry.get('scale', ''),
          cell.entry.get('rate', ''),
          cell.entry['trainable_parameters'],
          *(cell.loss(part) if done else '' for part in parts.values()),
          '' if cell.result is None else cell.result.get('seconds', ''),
          '' if clipped is None else clipped,
          int(row is not None),
          int(row.at_edge) if row else '',
          states.get(row.arm, '') if row else '',
          cell.error or '',
        ]
      )


def write_records(sweep: Sweep, path: Path) -> None:
  """A line a held-out record: what it is, and its nll under every cell."""
  cells = [cell for cell in sweep.cells if cell.result is not None]
  tokens = cells[0].last[1]
  with path.open('w', newline='', encoding='utf-8') as f:
    writer = csv.writer(f)
    names = ('index', 'part', 'category')
    writer.writerow([*names, 'tokens', *(f'nll {c.name}' for c in cells)])
    for i, record in enumerate(sweep.heldout):
      losses = (f'{cell.last[0][i]:.9g}' for cell in cells)
      writer.writerow([*(record[n] for n in names), tokens[i], *losses])
