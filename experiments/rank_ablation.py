"""Which rank does an instruction adapter on q and v need?

Question   which is the smallest rank that loses at most a tenth of what rank
           32 gains over the base, in held-out loss on Dolly, each rank at its
           own best learning rate?
Command    python -m launch.sweep --config=experiments/rank_ablation.py \\
             --workdir=DIR [--config.data.path=databricks-dolly-15k.jsonl]
           python -m experiments.report DIR
Design     five seeds and rates half a decade apart over two decades: what a
           claim needs. For a first look, one seed and fewer updates do
           (--config.grid.seeds and --config.steps). Gradients are not clipped:
           their norm goes as the scale times the root of the rank, so
           one bound would clip small ranks and leave large ones alone.
Cost       five days on two cores (an estimate), see
           experiments/README.md#rank-ablation
Result     not run yet; a smaller one: experiments/README.md#rank-ablation
"""

from experiments import dolly_lora
from gemma_jax.config.sweep import GridConfig, SweepConfig


def get_config() -> SweepConfig:
  """`dolly_lora` at every rank, rate and seed."""
  base = dolly_lora.get_config()
  base.optimizer.clip_norm = 0.0
  base.eval_every_steps = 100  # for the learning curves; adapters share an evaluation's cost
  # One row of 512 positions in each update, as in dolly_lora; all held-out records.
  base.data.max_eval_records = 0
  return SweepConfig(
    base=base,
    grid=GridConfig(
      ranks=(1, 2, 4, 8, 16, 32),
      seeds=(0, 1, 2, 3, 4),
      learning_rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    ),
  )
