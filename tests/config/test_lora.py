"""Targets, scales and ranks of an adapter, and what is refused."""

import pytest

from gemma_jax.config.lora import LoraConfig


@pytest.mark.parametrize('targets', ['embedder', 'q|v|embedder'])
def test_the_embedding_as_a_target_is_refused_with_the_reason(targets):
  with pytest.raises(ValueError, match=r'lora\.targets.*also the output layer'):
    LoraConfig(targets=targets).check()


@pytest.mark.parametrize(
  ('targets', 'names'),
  [
    ('qv', ('q', 'v')),
    ('attention', ('q', 'k', 'v', 'o')),
    ('all', ('q', 'k', 'v', 'o', 'gate', 'up', 'down')),
    ('q|v|gate', ('q', 'v', 'gate')),
    ('.*p', ('up',)),
    ('v|q', ('q', 'v')),  # the project's order, not the regex's
  ],
)
def test_targets_by_preset_or_regex(targets, names):
  assert LoraConfig(targets=targets).target_names == names


def test_scale_rules():
  scale = lambda rule: LoraConfig(rank=9, alpha=6.0, scale_rule=rule).scale
  assert scale('constant') == 6.0
  assert scale('alpha_over_r') == 6.0 / 9.0
  assert scale('alpha_over_sqrt_r') == 2.0


def test_ranks_by_the_first_regex_that_matches_the_whole_path():
  lora = LoraConfig(rank=8, ranks={'layer_[0-8]/.*': 4, '.*/mlp/up': 16})
  paths = ('layer_8/mlp/up', 'layer_9/mlp/up', 'layer_9/mlp/gate')
  assert [lora.rank_of(path) for path in paths] == [4, 16, 8]
