"""The recipe of the Keras tutorial "Fine-tune Gemma with LoRA".

Question   does the same recipe (Keras's factorization and initial A, scale 1,
           AdamW 5e-5 with decay 0.01, loss on every token, rows of one padded
           record) give the same parameter counts, and what does it learn?
Command    python -m launch.train --config=experiments/keras_tutorial.py \\
             --config.model.path=PATH --workdir=DIR
           or the same recipe on the 270M:
           python -m launch.train \\
             --config=experiments/keras_tutorial.py:gemma3_270m --workdir=DIR
           sampling as in the tutorial: launch.generate --temperature=1 --top_k=5
Cost       one epoch of 1000 rows of 256 positions; not run to completion yet
Result     1,363,968 adapter parameters on Gemma 1 2B, as published
Differs    the 1000 rows are the first of the training split; if data.path is
           the .jsonl file itself and there is a data.eval_path, the file's first
Source     ai.google.dev/gemma/docs/core/lora_tuning (the official tutorial)
"""

from gemma_jax.config.train import BaseConfig, DataConfig, LoraConfig, OptimizerConfig, TrainConfig


def get_config(model: str = 'random:gemma_2b') -> TrainConfig:
  """The recipe for a model reference, given after a colon behind the file name."""
  return TrainConfig(
    epochs=1,
    model=BaseConfig(path=model),
    # Keras's enable_lora(4) leaves lora_alpha at the rank: scale 1.
    lora=LoraConfig(
      rank=4, alpha=1.0, scale_rule='constant', targets='qv', factorization='keras', init='keras'
    ),
    optimizer=OptimizerConfig(
      learning_rate=5e-5,
      weight_decay=0.01,
      eps=1e-7,  # Keras's
      clip_norm=0.0,
    ),
    data=DataConfig(
      path='tfds:dolly',
      template='dolly',
      with_context=False,
      max_records=1000,
      max_eval_records=100,
      loss_on='all',
      seq_len=256,
      global_batch_size=1,
      packing=False,
    ),
  )
