"""Does the scale rule decide which rank looks best?

Question   scale constant, alpha / r or alpha / sqrt r (rsLoRA): with each
           rank at its own best rate, does the rule still matter? alpha is 2, so
           that the three rules agree at rank 1.
Command    python -m launch.sweep --config=experiments/scale_ablation.py \\
             --workdir=DIR
Cost       see experiments/README.md#shipped-ablations
Result     not run yet
"""

from experiments import rank_ablation
from gemma_jax.config.sweep import SweepConfig


def get_config() -> SweepConfig:
  """`rank_ablation` under three scale rules."""
  config = rank_ablation.get_config()
  config.base.lora.alpha = 2.0
  config.grid.ranks = (1, 8, 32)
  config.grid.scale_rules = ('constant', 'alpha_over_r', 'alpha_over_sqrt_r')
  return config
