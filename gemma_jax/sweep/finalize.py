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
from gemma_jax.config.train import LoraConfig, TrainConfig
from gemma_jax.formats import peft
from gemma_jax.lora import align, spectrum
from gemma_jax.runs import batched
from gemma_jax.runs import prepare as run_lib
from gemma_jax.runs import workdir as workdir_lib
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
  run = run_lib.prepare(configs[first.name])
  check_inputs(run.fingerprints())
  params = evaluation.load_base(run)
  if grid.truncate and not run.config.lora.dora:
    for cell, ranks in _largest(sweep):
      _truncate(run, params, configs[cell.name], cell, ranks, workdir, should_stop)
  if grid.sample_prompts and run.tokenizer is not None:
    _sample(run, params, sweep, grid, workdir)


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


def _truncate(run, params, config, cell, ranks, workdir, should_stop) -> None:
  """Evaluates one adapter cut to each of the ranks, all in one pass."""
  names = [f'truncated-{cell.name}-to-r{rank}' for rank in ranks]
  if manifest.has_ended(workdir, names):
    return
  model_config = run.source.config
  lora_config, factors = peft.read_adapter(cell.folder / 'adapter', model_config)
  cut = [spectrum.truncate(factors, lora_config, model_config, r) for r in ranks]
  members = batched.Gang(
    [
      dataclasses.replace(
        config,
        lora=LoraConfig(
          rank=rank,
          alpha=1.0,  # the scale is in the factors
          scale_rule='constant',
          targets=config.lora.targets,
        ),
      )
      for rank in ranks
    ],
    run,
  )
  found = evaluation.evaluate_adapters(
    members, params, batched.stack(align.align(cut)), should_stop
  )
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


def _sample(run, params, sweep: Sweep, grid: GridConfig, workdir: str) -> None:
  """The answers of base and ranks to the first test prompts, greedy."""
  path = os.path.join(workdir, manifest.SAMPLES)
  if os.path.exists(path):
    return
  indices = np.flatnonzero(sweep.part('test'))[: grid.sample_prompts].tolist()
  prompts, references = [], []
  for index in indices:
    tokens, mask = run.heldout[index]
    start = int(np.flatnonzero(mask)[0])
    prompts.append(tokens[:start].tolist())
    references.append(tokens[start:].tolist())
  cells = [found[0] for found in sweep.chosen().values()]
  loaded = align.load_adapters(
    [str(cell.folder / 'adapter') for cell in cells],
    run.source.config,
    run.config.model.scan_layers,
  )
  sampler = sampler_lib.Sampler.of_base(
    run.source, run.tokenizer, scan_layers=run.config.model.scan_layers
  )
  sampling = SamplingConfig(max_new_tokens=grid.sample_tokens, temperature=0.0)
  names = ['base', *(cell.name for cell in cells)]
  decode = run.tokenizer.decode
  rows = []
  answers = [sampler.generate(each.variables(params), prompts, sampling).tokens for each in loaded]
  for i, index in enumerate(indices):
    rows.append(
      {
        'index': int(run.heldout.record_ids[index]),
        'prompt': decode(prompts[i]),
        'reference': decode(references[i]),
        'answers': {name: decode(made[i]) for name, made in zip(names, answers, strict=True)},
      }
    )
  files.write_json_lines(path, rows)
