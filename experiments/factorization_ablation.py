"""One A for all heads, or one for each?

Question   the paper's factors (A [D, r], B [r, N, H]) against those of Keras's
           EinsumDense (A [N, D, r], B [r, H]) with the same number of
           parameters: which learns more from Dolly?
Command    python -m launch.sweep \\
             --config=experiments/factorization_ablation.py --workdir=DIR
Cost       see experiments/README.md#shipped-ablations
Result     not run yet
"""

from experiments import rank_ablation
from gemma_jax.config.sweep import SweepConfig


def get_config() -> SweepConfig:
  """`rank_ablation` with both factorizations at three budgets."""
  config = rank_ablation.get_config()
  config.grid.ranks, config.grid.equal_parameters = (6, 12, 24), True
  config.grid.factorizations = ('matrix', 'keras')
  return config
