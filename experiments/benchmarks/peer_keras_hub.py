"""KerasHub on JAX: `enable_lora`, then one padded batch at a time."""

import os
import time

os.environ['KERAS_BACKEND'] = 'jax'

import keras
import keras_hub
import numpy as np
import protocol


def load(job):
  """The causal language model, without its preprocessor."""
  model = keras_hub.models.CausalLM.from_preset(
    job['model'], preprocessor=None, dtype=job.get('dtype', 'float32')
  )
  return model


def train(job):
  """LoRA on q and v (Keras's factorization), AdamW."""
  model = load(job)
  model.backbone.enable_lora(protocol.RANK)
  model.compile(
    optimizer=keras.optimizers.AdamW(protocol.LEARNING_RATE, weight_decay=0.0, global_clipnorm=1.0),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
  )
  seconds, tokens, losses, supervised = [], [], [], 0
  first = None
  for ids, is_real, loss_mask in protocol.batches(job):
    started = time.perf_counter()
    x = {'token_ids': ids, 'padding_mask': is_real}
    y = np.pad(ids[:, 1:], ((0, 0), (0, 1)))
    weights = np.pad(loss_mask[:, 1:], ((0, 0), (0, 1))).astype('float32')
    logs = model.train_on_batch(x, y, sample_weight=weights, return_dict=True)
    # Keras divides by all positions, the others by those that count.
    losses.append(float(logs['loss']))
    seconds.append(time.perf_counter() - started)
    first = first or time.perf_counter() - protocol.STARTED
    tokens.append(int(is_real.sum()))
    supervised += int(loss_mask.sum())
  assert first is not None  # a job has an update
  return protocol.summarize_training(job, seconds, tokens, supervised, losses, first)


if __name__ == '__main__':
  protocol.main(train)
