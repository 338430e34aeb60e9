"""What a sweep does once all cells have ended, at the rates then chosen.

Truncation: the largest rank's adapters are cut to every smaller rank by SVD and
evaluated, to stand beside those that were trained at that rank. Samples: the
base and one adapter of each rank answer the same held-out prompts.
"""

from collections.abc import Callable, Iterator
import dataclasses
import os

from absl import logging
import numpy as np

from gemma_jax import files
from gemma_jax.config.train import TrainConfig
from gemma_jax.formats import adapter
from gemma_jax.lora import spectrum
from gemma_jax.lora.lora import Lora
from gemma_jax.runs import prepare as prepare_lib
from gemma_jax.runs import workdir as workdir_lib
from gemma_jax.runs.trainer import Trainer
from gemma_jax.sampling import sampler as sampler_lib
from gemma_jax.sampling.next_token import SamplingConfig
from gemma_jax.sweep import evaluation, manifest, results
from gemma_jax.sweep.grid import GridConfig
from gemma_jax.sweep.results import Outcome, Sweep


def close(
  configs: dict[str, TrainConfig],
  grid: GridConfig,
  workdir: str,
  should_stop: Callable[[], bool] = lambda: False,
  check_inputs: Callable[[dict[str, str]], None] = lambda fingerprints: None,
) -> None:
  """Writes the truncated cells and samples.jsonl that are not there yet.

  Args:
    configs: of the cells by name, resolved.
    grid: of the sweep.
    workdir: of the sweep, all of whose cells have ended.
    should_stop: asked at every evaluation batch.
    check_inputs: as `train.train` takes it.

  Raises:
    Stopped: should_stop said so.
  """
  sweep = results.read(workdir)
  chosen = sweep.chosen()
  if not chosen:
    return
  first = next(iter(chosen.values()))[0]
  run = prepare_lib.prepare(configs[first.name])
  check_inputs(run.fingerprints())
  base = run.base.load()
  if grid.truncate and not run.config.lora.dora:
    for cell, ranks in _largest(sweep):
      _truncate(run, base, configs[cell.name], cell, ranks, workdir, should_stop)
  if grid.sample_prompts and base.tokenizer is not None:
    _sample(run, base, sweep, grid, workdir)


def _largest(sweep: Sweep) -> Iterator[tuple[Outcome, list[int]]]:
  """Every seed's cell of the largest rank, and the smaller ranks."""
  by_rank: dict[results.Arm, dict[int, list[Outcome]]] = {}
  for arm, cells in sweep.chosen().items():
    rest = tuple(item for item in arm if item[0] != 'rank')
    by_rank.setdefault(rest, {})[dict(arm)['rank']] = cells
  for ranks in by_rank.values():
    *smaller, largest = sorted(ranks)
    if smaller:
      for cell in ranks[largest]:
        yield cell, smaller


def _truncate(run, base, config, cell, ranks, workdir, should_stop) -> None:
  """Evaluates one adapter cut to each of the ranks, all in one pass."""
  names = [f'truncated-{cell.name}-to-r{rank}' for rank in ranks]
  if manifest.has_ended(workdir, names):
    return
  lora = adapter.read(cell.folder / 'adapter', base.config)
  cut = Lora.stack([spectrum.truncate(lora, base.config, rank) for rank in ranks])
  several = prepare_lib.with_members(
    run, [dataclasses.replace(config, lora=each) for each in cut.configs]
  )
  found = Trainer.of_run(several, base, cut).evaluate(should_stop=should_stop)
  step = cell.result['steps']
  for name, rank, each in zip(names, ranks, found, strict=True):
    folder = manifest.cell_folder(workdir, name)
    os.makedirs(folder, exist_ok=True)
    entry = {
      'name': name,
      'kind': 'truncated',
      'axes': {**cell.axes, 'rank': rank, 'from_rank': cell.axes['rank']},
      'trainable_parameters': 0,
    }
    workdir_lib.write_json(folder, 'truncated.json', entry)
    evaluation.write_cell(folder, step, run, each)
  logging.info('Evaluated %s cut to the ranks %s', cell.name, ranks)


def _sample(run, base, sweep: Sweep, grid: GridConfig, workdir: str) -> None:
  """The answers of base and ranks to the first test prompts, greedy."""
  path = os.path.join(workdir, manifest.SAMPLES)
  if os.path.exists(path):
    return
  indices = np.flatnonzero(sweep.part('test'))[: grid.sample_prompts].tolist()
  prompts, references = [], []
  for index in indices:
    tokens, mask = run.data.heldout[index]
    start = int(np.flatnonzero(mask)[0])
    prompts.append(tokens[:start].tolist())
    references.append(tokens[start:].tolist())
  cells = [found[0] for found in sweep.chosen().values()]
  loaded = adapter.load_adapters(
    [str(cell.folder / 'adapter') for cell in cells], base.config, base.scan_layers
  )
  sampler = sampler_lib.Sampler.of_base(base.source, base.tokenizer, scan_layers=base.scan_layers)
  sampling = SamplingConfig(max_new_tokens=grid.sample_tokens, temperature=0.0)
  names = ['base', *(cell.name for cell in cells)]
  decode = base.tokenizer.decode
  rows = []
  answers = [
    sampler.generate(lora.variables(base.params), prompts, sampling).tokens
    for lora in loaded.values()
  ]
  for i, index in enumerate(indices):
    rows.append(
      {
        'index': int(run.data.heldout.record_ids[index]),
        'prompt': decode(prompts[i]),
        'reference': decode(references[i]),
        'answers': {name: decode(made[i]) for name, made in zip(names, answers, strict=True)},
      }
    )
  files.write_json_lines(path, rows)
