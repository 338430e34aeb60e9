"""What decides a run's result, as the first lines of its log."""

import numpy as np

from gemma_jax.runs import prepare as run_lib


def describe(run: run_lib.Run) -> str:
  """Base, adapter, optimizer, data and mesh, a line or two each."""
  lora, tx, data = run.config.lora, run.config.optimizer, run.config.data
  lines = [
    f'base: {run.base.reference}, {run.base.dtype} weights, '
    f'{np.dtype(run.base.transformer.dtype)} activations',
    f'adapter: {"DoRA" if lora.dora else "LoRA"}, rank {lora.rank} on '
    f'{" ".join(lora.target_names)}, scale {lora.scale:g}, dropout '
    f'{lora.dropout:g}',
    *(f'adapter: rank {r} at {where}' for where, r in lora.ranks.items()),
    *([f'adapter: starts as {lora.path}'] if lora.path else []),
    f'optimizer: AdamW, learning rate {tx.learning_rate:g} {tx.schedule} '
    f'after {tx.warmup_steps} steps of warm-up, weight decay '
    f'{tx.weight_decay:g}, clip {tx.clip_norm:g}',
    *describe_data(run),
    f'{run.steps:,} steps of {data.global_batch_size} rows x {data.seq_len} '
    f'positions ({run.plan.rows_per_epoch():,} rows an epoch); mesh '
    f'{dict(run.base.mesh.shape)} on {run.base.mesh.devices.flat[0].device_kind}',
  ]
  return '\n'.join(lines)


def describe_data(run: run_lib.Run) -> list[str]:
  """What happened to the records: read, cut, left out, skipped, not read."""
  data = run.config.data
  return [
    f'data: {data.path}, template {data.template}, loss on {data.loss_on}',
    run.data.train.stats.line('training'),
    run.data.heldout.stats.line('held-out'),
    *run.data.notes,
  ]
