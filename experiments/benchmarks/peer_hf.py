"""Transformers and PEFT on PyTorch, as their documentation shows them."""

import time

import numpy as np
import peft
import protocol
import torch
import transformers


def load(job):
  """The causal language model in the job's dtype."""
  return transformers.AutoModelForCausalLM.from_pretrained(
    job['model'], dtype=getattr(torch, job.get('dtype', 'float32'))
  )


def train(job):
  """LoRA on q and v, AdamW, one update per padded batch."""
  config = peft.LoraConfig(
    r=protocol.RANK,
    lora_alpha=protocol.RANK,
    target_modules=['q_proj', 'v_proj'],
    task_type='CAUSAL_LM',
  )
  model = peft.get_peft_model(load(job), config)
  model.train()
  adapter = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(adapter, lr=protocol.LEARNING_RATE, weight_decay=0.0)
  seconds, tokens, losses, supervised = [], [], [], 0
  first = None
  for ids, is_real, loss_mask in protocol.batches(job):
    started = time.perf_counter()
    labels = np.where(loss_mask, ids, -100)
    out = model(
      input_ids=torch.tensor(ids, dtype=torch.long),
      attention_mask=torch.tensor(is_real, dtype=torch.long),
      labels=torch.tensor(labels, dtype=torch.long),
      use_cache=False,
    )
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(adapter, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(out.loss.detach()))
    seconds.append(time.perf_counter() - started)
    first = first or time.perf_counter() - protocol.STARTED
    tokens.append(int(is_real.sum()))
    supervised += int(loss_mask.sum())
  assert first is not None  # a job has an update
  return protocol.summarize_training(job, seconds, tokens, supervised, losses, first)


def decode(job):
  """Greedy `generate`; the time of the prompt and first token is subtracted."""
  model = load(job).eval()
  prompt = torch.tensor([job['prompt']])

  def generate(count):
    started = time.perf_counter()
    with torch.no_grad():
      out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
      )
    return out[0, len(job['prompt']) :].tolist(), time.perf_counter() - started

  generate(2)
  _, prompt_seconds = generate(1)
  tokens, seconds = generate(job['new_tokens'] + 1)
  return {'tokens_per_second': job['new_tokens'] / (seconds - prompt_seconds), 'tokens': tokens}


if __name__ == '__main__':
  protocol.main(train, decode)
