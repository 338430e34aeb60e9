"""What training K adapters as one batch saves, compared with one run each.

  python -m experiments.benchmarks.batched [--steps=60] [--seq_len=128]

Both ways use the commands that a user calls, on the embedded records, each with
an empty compilation cache: `launch.sweep` with all ranks in one batch, and
`launch.train` once for each rank. Prints one JSON line: seconds of both and
their ratio, seconds per update and adapter, and peak memory of the batch and of
the largest single run.
"""

import argparse
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import time

from gemma_jax import files


def main() -> None:
  """Runs both ways."""
  parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument('--model', default='gemma3_270m')
  parser.add_argument('--ranks', default='1,2,4,8,16,32')
  parser.add_argument('--steps', type=int, default=60)
  parser.add_argument('--seq_len', type=int, default=128)
  options = parser.parse_args()
  ranks = tuple(map(int, options.ranks.split(',')))
  shared = [
    f'--config.model.path={options.model}',
    f'--config.steps={options.steps}',
    f'--config.data.seq_len={options.seq_len}',
    '--config.data.path=sample:seoul_travel',
    '--config.data.max_eval_records=6',
    '--config.eval_every_steps=0',
    '--config.checkpoint_every_steps=0',
  ]
  with tempfile.TemporaryDirectory() as folder:
    batched_secs = _run(
      'sweep',
      f'{folder}/batched',
      'rank_ablation',
      [
        *shared,
        f'--config.grid.ranks={ranks}',
        '--config.grid.seeds=(0,)',
        '--config.grid.learning_rates=(1e-3,)',
        '--config.grid.baselines=()',
        '--config.grid.truncate=False',
        '--config.grid.sample_prompts=0',
      ],
    )
    batched = [
      json.loads(path.read_text('utf-8'))
      for path in Path(folder).glob('batched/cells/*/result.json')
    ]
    alone_secs, alone = 0.0, []
    for rank in ranks:
      workdir = f'{folder}/alone-{rank}'
      alone_secs += _run('train', workdir, 'dolly_lora', [*shared, f'--config.lora.rank={rank}'])
      text = Path(workdir, 'result.json').read_text('utf-8')
      alone.append(json.loads(text))
    steps = [_step_secs(f'{folder}/alone-{rank}') for rank in ranks]
  print(
    json.dumps(
      {
        'model': options.model,
        'ranks': ranks,
        'steps': options.steps,
        'seq_len': options.seq_len,
        'gang_seconds': round(batched_secs, 1),
        'separate_seconds': round(alone_secs, 1),
        'ratio': round(batched_secs / alone_secs, 3),
        'gang_step_seconds_per_adapter': round(batched[0]['seconds'] / options.steps, 4),
        'separate_step_seconds': round(sum(steps) / len(steps), 4),
        'gang_peak_bytes': max(r['peak_memory_bytes'] for r in batched),
        'separate_peak_bytes': max(r['peak_memory_bytes'] for r in alone),
      }
    )
  )


def _run(command: str, workdir: str, config: str, flags: list[str]) -> float:
  """Seconds that a command takes, including its start and compilations."""
  started = time.perf_counter()
  subprocess.run(
    [
      sys.executable,
      '-m',
      f'launch.{command}',
      f'--config=experiments/{config}.py',
      f'--workdir={workdir}',
      f'--config.compilation_cache={workdir}.cache',
      *flags,
    ],
    check=True,
    stdout=subprocess.DEVNULL,
    env={**os.environ, 'JAX_PLATFORMS': os.environ.get('JAX_PLATFORMS', 'cpu')},
  )
  return time.perf_counter() - started


def _step_secs(workdir: str) -> float:
  """Mean seconds of an update, the first left out."""
  rows = files.read_json_lines(Path(workdir, 'metrics.jsonl'))
  seconds = [row['step_secs'] for row in rows if 'step_secs' in row][1:]
  return sum(seconds) / len(seconds)


if __name__ == '__main__':
  main()
