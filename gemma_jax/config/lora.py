"""What an adapter is: rank, scale, targets, form and start."""

import dataclasses
import math
import re

from gemma_jax.config.checks import Freezable, at_least, check_choices, check_regex, choice, require

# Which projections a preset name stands for; a regex over these names works
# as well, e.g. targets='q|v|gate'.
PROJECTIONS = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')
TARGET_PRESETS = {'qv': 'q|v', 'attention': 'q|k|v|o', 'all': '|'.join(PROJECTIONS)}


@dataclasses.dataclass
class LoraConfig(Freezable):
  """Low-rank adapters: W' = W + scale * B A (Hu et al. 2021, eq. 3).

  Attributes:
    rank: r.
    alpha: numerator of the scale.
    scale_rule: constant (scale = alpha), alpha_over_r (the paper) or
      alpha_over_sqrt_r (rsLoRA, Kalajdzievski 2023).
    targets: preset qv, attention or all, or a regex over q k v o gate up down.
    factorization: matrix (A [D, r], B [r, N, H]: the paper, PEFT) or keras
      (A takes the kernel's shape with r for its last axis).
    init: peft (kaiming_uniform, a = sqrt 5) or keras (he_uniform) for A.
    dropout: rate on the adapter's input while training; with DoRA only on that of
      B A (PEFT also drops inputs of the base's share of the gain).
    dora: also train the length of each output's weights (Liu et al. 2024).
    path: adapter to start from, a PEFT folder or a .lora.h5 file of Keras; all
      fields but dropout then become its own. '' starts a new one.
    ranks: ranks that differ from `rank`, by path (in an experiment's file), e.g.
      {'layer_[0-8]/.*': 4, '.*/mlp/up': 16}; the first regex that matches the
      whole path counts. All share one scale.
  """

  rank: int = 8
  alpha: float = 16.0
  scale_rule: str = choice('alpha_over_r', 'constant', 'alpha_over_r', 'alpha_over_sqrt_r')
  targets: str = 'qv'
  factorization: str = choice('matrix', 'matrix', 'keras')
  init: str = choice('peft', 'peft', 'keras')
  dropout: float = 0.0
  dora: bool = False
  path: str = ''
  ranks: dict[str, int] = dataclasses.field(default_factory=dict)

  def __hash__(self) -> int:
    """Hash of a frozen config, which is a static part of the pytree `lora.Lora`."""
    fields = (getattr(self, field.name) for field in dataclasses.fields(self))
    return hash(tuple(frozenset(x.items()) if isinstance(x, dict) else x for x in fields))

  @property
  def scale(self) -> float:
    """The factor on B A that the rule gives for this rank."""
    return {
      'constant': self.alpha,
      'alpha_over_r': self.alpha / self.rank,
      'alpha_over_sqrt_r': self.alpha / self.rank**0.5,
    }[self.scale_rule]

  @property
  def target_names(self) -> tuple[str, ...]:
    """The projections that carry an adapter, in the order q k v o ..."""
    pattern = TARGET_PRESETS.get(self.targets, self.targets)
    return tuple(p for p in PROJECTIONS if re.fullmatch(pattern, p))

  def rank_of(self, path: str) -> int:
    """The rank of a module of the unrolled tree, e.g. layer_3/attn/q."""
    for pattern, rank in self.ranks.items():
      if re.fullmatch(pattern, path):
        return rank
    return self.rank

  def check(self):
    for pattern, rank in self.ranks.items():
      at_least(f'lora.ranks[{pattern!r}]', rank, 1)
      check_regex('lora.ranks', pattern)
    at_least('lora.rank', self.rank, 1, 'To evaluate the base alone, pass no adapter.')
    require(0 < self.alpha < math.inf, 'lora.alpha', self.alpha, 'a number > 0')
    check_choices(self, 'lora')
    require(0 <= self.dropout < 1, 'lora.dropout', self.dropout, 'a rate in [0, 1)')
    choices = f'{", ".join(TARGET_PRESETS)} or a regex over {PROJECTIONS}'
    is_text = isinstance(self.targets, str)
    require(is_text, 'lora.targets', self.targets, choices, "E.g. 'q|v'.")
    try:
      names = self.target_names
    except re.error as e:
      raise ValueError(
        f'lora.targets: got {self.targets!r}, which is not a regex ({e}); expected {choices}.'
      ) from None
    remedy = ''
    if 'embed' in self.targets:
      remedy = (
        'The embedding is also the output layer (tied); an adapter on it '
        'would change both, so it is not offered.'
      )
    is_fine = bool(names) and not remedy
    require(is_fine, 'lora.targets', self.targets, choices, remedy)
