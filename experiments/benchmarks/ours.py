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

  from gemma_jax.data import pipeline
  from gemma_jax.runs import prepare as run_lib
  from gemma_jax.training import sharding

  set_cache(jax, job.get('cache', 'warm'))
  with tempfile.TemporaryDirectory() as folder:
    run = run_lib.prepare(_config(job, folder))
  state, frozen = _start(jax, run)
  train_step = run.compile_train_step()
  seconds, tokens, losses, supervised = [], [], [], 0
  first = None
  batches = pipeline.train_batches(run.train, run.plan, 0, run.steps)
  for _, batch in batches:
    started = time.perf_counter()
    state, metrics = train_step(state, frozen, sharding.put_batch(batch, run.mesh))
    losses.append(float(metrics['loss']))  # waits for it
    seconds.append(time.perf_counter() - started)
    first = first or time.perf_counter() - protocol.STARTED
    # A document fills a slot less than it has tokens.
    ends = batch['segment_ids'].max(axis=1).sum()
    tokens.append(int((batch['segment_ids'] > 0).sum() + ends))
    supervised += int(metrics['supervised_tokens'])
  return protocol.summarize_training(job, seconds, tokens, supervised, losses, first)


def _config(job, folder):
  """The job's config, with a held-out file, lest one be taken off it."""
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


def _start(jax, run):
  """State and frozen leaves at step 0, where the compiled step wants them."""
  from gemma_jax.training import state as state_lib

  state, frozen = run.abstract
  placed = jax.tree.map(lambda x: x.sharding, state_lib.join(state.trainable, frozen))
  params = run.source.load_params(run.dtype, shardings=placed['params'])
  adapter = state_lib.init_adapter(run.config, run.source.config)
  trainable, frozen = state_lib.split(
    {'params': params, 'lora': jax.device_put(adapter, placed['lora'])}, run.config.trainable
  )
  shardings = jax.tree.map(lambda x: x.sharding, state)
  return jax.device_put(state_lib.init_state(trainable, run.tx), shardings), frozen


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
  """Compiled programs of earlier runs, or a folder without any."""
  folder = Path.home() / '.cache' / 'gemma_jax' / 'benchmarks'
  if cache == 'cold':
    folder = Path(tempfile.mkdtemp())
  os.makedirs(folder, exist_ok=True)
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


if __name__ == '__main__':
  protocol.main(train, decode)
