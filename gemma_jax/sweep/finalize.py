"""What a sweep does once all trials have ended, at the learning rates then chosen.

Truncation: the largest rank's adapters are cut to every smaller rank by SVD and
evaluated, for comparison with those trained at that rank. Samples: the base and
one adapter of each rank answer the same held-out prompts.
"""

from collections.abc import Callable, Iterator
import dataclasses
import os

from absl import logging
import numpy as np

from gemma_jax import files
from gemma_jax.config.sweep import GridConfig
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
from gemma_jax.sweep.results import Outcome, Sweep


def finalize(
  configs: dict[str, TrainConfig],
  grid: GridConfig,
  workdir: str,
  should_stop: Callable[[], bool] = lambda: False,
  check_inputs: Callable[[dict[str, str]], None] = lambda fingerprints: None,
) -> None:
  """Writes the truncated trials and samples.jsonl, unless they are already there.

  Args:
    configs: the trials' configs by name, resolved.
    grid: the sweep's grid.
    workdir: of the sweep, all of whose trials have ended.
    should_stop: called before every evaluation batch.
    check_inputs: as in `train.train`.

  Raises:
    Stopped: should_stop returned True.
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
    for trial, ranks in _largest(sweep):
      _truncate(run, base, configs[trial.name], trial, ranks, workdir, should_stop)
  if grid.sample_prompts and base.tokenizer is not None:
    _sample(run, base, sweep, grid, workdir)


def _largest(sweep: Sweep) -> Iterator[tuple[Outcome, list[int]]]:
  """Yields every seed's trial of the largest rank, with the smaller ranks."""
  by_rank: dict[results.Arm, dict[int, list[Outcome]]] = {}
  for arm, trials in sweep.chosen().items():
    rest = tuple(item for item in arm if item[0] != 'rank')
    by_rank.setdefault(rest, {})[dict(arm)['rank']] = trials
  for ranks in by_rank.values():
    *smaller, largest = sorted(ranks)
    if smaller:
      for trial in ranks[largest]:
        yield trial, smaller


def _truncate(run, base, config, trial, ranks, workdir, should_stop) -> None:
  """Evaluates one adapter cut to each of the ranks, all in one pass over the data."""
  names = [f'truncated-{trial.name}-to-r{rank}' for rank in ranks]
  if manifest.has_ended(workdir, names):
    return
  lora = adapter.read(trial.folder / 'adapter', base.config)
  cut = Lora.stack([spectrum.truncate(lora, base.config, rank) for rank in ranks])
  several = prepare_lib.with_members(
    run, [dataclasses.replace(config, lora=each) for each in cut.configs]
  )
  evaluations = Trainer.of_run(several, base, cut).evaluate(should_stop=should_stop)
  step = trial.result['steps']
  for name, rank, each in zip(names, ranks, evaluations, strict=True):
    folder = manifest.trial_folder(workdir, name)
    os.makedirs(folder, exist_ok=True)
    entry = {
      'name': name,
      'kind': 'truncated',
      'axes': {**trial.axes, 'rank': rank, 'from_rank': trial.axes['rank']},
      'trainable_parameters': 0,
    }
    workdir_lib.write_json(folder, 'truncated.json', entry)
    evaluation.write_trial(folder, step, run, each)
  logging.info('Evaluated %s, truncated to ranks %s', trial.name, ranks)


def _sample(run, base, sweep: Sweep, grid: GridConfig, workdir: str) -> None:
  """Writes greedy answers of the base and of each rank to the first test prompts."""
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
  trials = [chosen[0] for chosen in sweep.chosen().values()]
  loaded = adapter.load_adapters(
    [str(trial.folder / 'adapter') for trial in trials], base.config, base.scan_layers
  )
  sampler = sampler_lib.Sampler.of_base(base.source, base.tokenizer, scan_layers=base.scan_layers)
  sampling = SamplingConfig(max_new_tokens=grid.sample_tokens, temperature=0.0)
  names = ['base', *(trial.name for trial in trials)]
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
