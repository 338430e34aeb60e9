"""Which rank does an instruction adapter on q and v need?

Question   ranks 1 to 32 on Dolly, each at its own best learning rate and over
           three seeds: at which rank does the held-out loss stop falling?
Command    python -m launch.sweep --config=experiments/rank_ablation.py \\
             --workdir=DIR [--config.data.path=databricks-dolly-15k.jsonl]
           python -m experiments.report DIR
Cost       see experiments/README.md#rank-ablation
Result     see experiments/README.md#rank-ablation
"""

import dataclasses

from experiments import dolly_lora
from gemma_jax.config import TrainConfig
from gemma_jax.sweep.grid import GridConfig, SweepConfig


def get_config() -> SweepConfig:
  """`dolly_lora` at every rank, rate and seed."""
  base = dolly_lora.get_config()
  shared = {
    f.name: getattr(base, f.name) for f in dataclasses.fields(TrainConfig)
  }
  config = SweepConfig(
    **shared,
    grid=GridConfig(
      ranks=(1, 2, 4, 8, 16, 32),
      seeds=(0, 1, 2),
      learning_rates=(5e-4, 1e-3, 2e-3),
    ),
  )
  # One row of 512 in each update, as there; all held-out records.
  config.data.max_eval_records = 0
  return config
