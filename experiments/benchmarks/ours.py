"""gemma_jax as its commands run it: step, data pipeline and `Sampler`."""

import json
import os
from pathlib import Path
import tempfile
import time

from experiments.benchmarks import protocol


def train(job):
  """The commands' own step and data pipeline, without evaluations."""
  import jax

  from gemma_jax.runs import prepare
  from gemma_jax.runs.trainer import Trainer

  set_cache(jax, job.get('cache', 'warm'))
  with tempfile.TemporaryDirectory() as folder:
    run = prepare.prepare(_config(job, folder))
  trainer = Trainer.of_run(run)
  trainer.compile(run.abstract_batch())
  seconds, tokens, losses, supervised = [], [], [], 0
  first = None
  for _, batch in trainer.batches(run.steps):
    started = time.perf_counter()
    metrics = trainer.step(batch)
    losses.append(metrics.loss)
    seconds.append(time.perf_counter() - started)
    first = first or time.perf_counter() - protocol.STARTED
    # A document fills one slot less than it has tokens.
    ends = int(batch['segment_ids'].max(axis=1).sum())
    tokens.append(int(metrics.tokens) + ends)
    supervised += int(metrics.weight)
  assert first is not None  # a job has an update
  return protocol.summarize_training(job, seconds, tokens, supervised, losses, first)


def _config(job, folder):
  """The job's config, with a held-out file, so that none of its records are held out."""
  from gemma_jax.config.train import (
    BaseConfig,
    DataConfig,
    LoraConfig,
    OptimizerConfig,
    TrainConfig,
  )

  heldout = Path(folder) / 'heldout.jsonl'
  heldout.write_text(json.dumps({'tokens': [2, 3, 4, 5]}) + '\n', 'utf-8')
  return TrainConfig(
    steps=job['steps'],
    epochs=1,
    model=BaseConfig(path=job['model'], dtype=job['dtype']),
    lora=LoraConfig(rank=protocol.RANK, alpha=protocol.RANK, targets='qv'),
    optimizer=OptimizerConfig(learning_rate=protocol.LEARNING_RATE),
    data=DataConfig(
      path=job['records'],
      eval_path=str(heldout),
      seq_len=job['row_tokens'],
      global_batch_size=job['batch_size'],
    ),
  ).resolve()


def decode(job):
  """One prompt, greedily; rows end at new_tokens only."""
  import jax

  from gemma_jax.formats import open_base
  from gemma_jax.sampling import weights as weights_lib
  from gemma_jax.sampling.next_token import SamplingConfig
  from gemma_jax.sampling.sampler import Sampler

  set_cache(jax, 'warm')
  base = open_base.open_base(job['model'])
  weights = job['weights']
  params = base.load_params(weights_lib.load_dtype(weights))
  variables = weights_lib.prepare({'params': params}, weights)
  del params
  sampling = SamplingConfig(max_new_tokens=job['new_tokens'] + 1)
  made = Sampler(base.config, stop_ids=()).generate(variables, [job['prompt']], sampling)
  return {'tokens_per_second': made.tokens_per_second, 'tokens': made.tokens[0]}


def set_cache(jax, cache: str) -> None:
  """Sets the compilation cache: that of earlier runs, or an empty folder."""
  folder = Path.home() / '.cache' / 'gemma_jax' / 'benchmarks'
  if cache == 'cold':
    folder = Path(tempfile.mkdtemp())
  os.makedirs(folder, exist_ok=True)
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


if __name__ == '__main__':
  protocol.main(train, decode)
