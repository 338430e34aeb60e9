"""Which projections should carry LoRA, at equal parameters?

Question   q and v, all of attention, or all seven projections: with the same
           number of trainable parameters, which wins on Dolly? The ranks of the
           latter two are solved from those of q and v (on the 270M, rank 21 for
           q and v gives rank 4 for all seven).
Command    python -m launch.sweep --config=experiments/target_ablation.py \\
             --workdir=DIR
Cost       see experiments/README.md#shipped-ablations
Result     not run yet
"""

from experiments import rank_ablation
from gemma_jax.config.sweep import SweepConfig


def get_config() -> SweepConfig:
  """`rank_ablation` over three target sets, at three budgets."""
  config = rank_ablation.get_config()
  config.grid.ranks, config.grid.equal_parameters = (5, 21, 42), True
  config.grid.targets = ('qv', 'attention', 'all')
  return config
