"""Which configs can be trained at once (`training.batched`)."""

from collections.abc import Sequence
from typing import Any

from gemma_jax.config import train as config_lib
from gemma_jax.config.train import TrainConfig

# Fields in which adapters trained at once may differ.
MEMBER_FIELDS = (
  'seed',
  'lora.rank',
  'lora.alpha',
  'lora.scale_rule',
  'lora.init',
  'optimizer.learning_rate',
)


def common_fields(config: TrainConfig) -> dict[str, Any]:
  """The fields, by name, that adapters trained at once share.

  The seed is one of them if the order of the data depends on it.
  """
  fields = config_lib.flatten(config_lib.to_dict(config))
  own = set(MEMBER_FIELDS)
  if config.data.order_seed < 0:
    own.remove('seed')
  return {name: x for name, x in fields.items() if name not in own}


def check(configs: Sequence[TrainConfig]) -> None:
  """ValueError unless the resolved configs differ in `MEMBER_FIELDS` only."""
  if not configs:
    raise ValueError('batched adapters: got no config, expected at least one.')
  first = configs[0]
  if any(not pattern.startswith('lora') for pattern in first.trainable):
    raise ValueError(
      f'trainable: got {first.trainable}, expected adapters only: batched '
      'adapters share their base. Train this config alone.'
    )
  want = common_fields(first)
  for config in configs[1:]:
    got = common_fields(config)
    for name in sorted(want.keys() | got.keys()):
      if want.get(name) != got.get(name):
        raise ValueError(
          f'batched adapters: {name} is {want.get(name)!r} for one adapter and '
          f'{got.get(name)!r} for another, expected one value. Train them in different batches.'
        )
  if first.lora.path or first.lora.ranks:
    raise ValueError(
      'batched adapters: got lora.path or lora.ranks, expected neither: they start '
      'from scratch, with a single rank. Train this config alone.'
    )
  if first.max_skipped_batches:
    raise ValueError(
      f'max_skipped_batches: got {first.max_skipped_batches}, expected 0: a '
      'batch would be skipped for one adapter and not for another. Train this '
      'config alone.'
    )
