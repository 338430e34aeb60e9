"""A sweep's results without its training: losses as a test wants them."""

import os
from pathlib import Path

import numpy as np

from gemma_jax import files
from gemma_jax.runs import workdir as workdir_lib
from gemma_jax.sweep import manifest, results

RECORDS = 240  # half of them test records
GAIN = 0.5
STEP = 9


def outcome(kind, nll, tokens, **axes):
  """A finished cell with losses nll [N]."""
  entry = {
    'name': '-'.join([kind, *(f'{k}{v}' for k, v in axes.items())]),
    'kind': kind,
    'axes': axes,
    'trainable_parameters': 100 * axes.get('rank', 0),
    'scale': 1.0,
  }
  cell = results.Outcome(
    name=entry['name'],
    kind=kind,
    axes=axes,
    folder=Path('nowhere'),
    entry=entry,
    result={'seconds': 1.0, 'steps': STEP},
    error=None,
  )
  vars(cell)['losses'] = {STEP: (nll, tokens)}
  return cell


def make(
  levels,
  seeds=5,
  rates=(1e-3, 2e-3, 4e-3),
  noise=0.02,
  records=RECORDS,
  base=True,
  draw=0,
  axis='targets',
  **grid,
):
  """A sweep in memory, whose cells have no folder.

  Args:
    levels: rank, or (value of `axis`, rank) → the arm's loss above the records' own;
      that of the base is GAIN.
    seeds: how many, or arm → the seeds.
    rates: all but the middle one add 0.5 to a loss.
    noise: spread of an arm's loss by record, by record and seed, and, over the
      root of the records, by seed; or arm → it.
    records: half of which are test records.
    base: whether it is in the sweep.
    draw: of the noise.
    axis: that varies beside the rank.
    **grid: of the manifest.
  """
  shared = np.random.default_rng(0)
  tokens = shared.integers(10, 90, records)
  hard = shared.uniform(1, 9, records)
  cells = []
  if base:
    cells.append(outcome('base', (hard + GAIN) * tokens, tokens))
  for arm, level in levels.items():
    value, rank = arm if isinstance(arm, tuple) else ('qv', arm)
    spread = noise[arm] if isinstance(noise, dict) else noise
    # An arm's losses are its own, whichever other arms there are.
    rng = np.random.default_rng([draw, rank, len(value)])
    of_records = rng.normal(0, spread, records)
    for seed in seeds[arm] if isinstance(seeds, dict) else range(seeds):
      loss = hard + level + of_records + rng.normal(0, spread, records)
      loss += rng.normal(0, spread / np.sqrt(records))
      for i, rate in enumerate(rates):
        cells.append(
          outcome(
            'lora',
            (loss + 0.5 * (i != len(rates) // 2)) * tokens,
            tokens,
            rank=rank,
            seed=seed,
            learning_rate=rate,
            **{axis: value},
          )
        )
  heldout = [
    {'index': i, 'part': ('test', 'validation')[i % 2], 'category': ('a', 'b')[i * 2 // records]}
    for i in range(records)
  ]
  config = {'grid': {'margin': 0.1, **grid}, 'optimizer': {'clip_norm': 0.0}}
  made = {'config': config, 'base': 'made', 'fingerprints': {'data': '0'}}
  return results.Sweep(Path('nowhere'), made, cells, heldout)


def write(sweep, workdir) -> str:
  """The folder that `results.read` reads this sweep from."""
  workdir = str(workdir)
  for cell in sweep.trials:
    folder = manifest.trial_folder(workdir, cell.name)
    os.makedirs(folder)
    nll, tokens = cell.last
    workdir_lib.write_heldout(folder, STEP, range(len(nll)), nll, tokens)
    workdir_lib.write_json(folder, 'result.json', cell.result)
  files.write_json_lines(f'{workdir}/heldout.jsonl', sweep.heldout)
  entries = [cell.entry for cell in sweep.trials]
  workdir_lib.write_json(workdir, manifest.NAME, {**sweep.manifest, 'cells': entries})
  return workdir
