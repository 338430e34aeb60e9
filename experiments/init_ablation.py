"""Does the limit of the initial A matter?

Question   PEFT draws A within 1 / sqrt(D), Keras within sqrt(6 / D) here, 2.4
           times as wide: is that a hidden variable of rank comparisons?
Command    python -m launch.sweep --config=experiments/init_ablation.py \\
             --workdir=DIR
Cost       see experiments/README.md#shipped-ablations
Result     not run yet
"""

from experiments import rank_ablation
from gemma_jax.config.sweep import SweepConfig


def get_config() -> SweepConfig:
  """`rank_ablation` with both initial limits."""
  config = rank_ablation.get_config()
  config.grid.ranks, config.grid.inits = (1, 8, 32), ('peft', 'keras')
  return config
