"""Does a rank-8 adapter teach the smallest Gemma how to answer a traveller?

Question   can 355 question/answer records change what a 270M base says about
           Seoul, measured on 40 held-out records that are not paraphrases?
Command    bash launch/quickstart.sh
Cost       see experiments/README.md#quickstart
Result     see experiments/README.md#quickstart
"""

from gemma_jax.config.train import BaseConfig, DataConfig, LoraConfig, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
  """The config of `launch/quickstart.sh`."""
  return TrainConfig(
    steps=160,
    checkpoint_every_steps=20,
    model=BaseConfig(path='gemma3_270m'),
    lora=LoraConfig(rank=8, alpha=16.0, targets='all'),
    optimizer=OptimizerConfig(learning_rate=1e-3, schedule='cosine', warmup_steps=5),
    # A small batch makes many updates of few tokens.
    data=DataConfig(path='sample:seoul_travel', seq_len=256, global_batch_size=1),
  )
