"""Adds PEFT's DoRA, and its patterns of rank and alpha, to the golden files.

  pip install torch==2.13.0 transformers==5.24.0 peft==0.21.2
  python tests/golden/parity/make_peft.py tests/golden/parity

Logits are kept for the first COLUMNS rows of the vocabulary only.
"""

import json
from pathlib import Path
import sys

import peft
from safetensors.torch import load_file, save_file
import torch
import transformers

ALL = [f'{name}_proj' for name in ('q', 'k', 'v', 'o', 'gate', 'up', 'down')]
COLUMNS = 128
STEPS = 4


def make(folder: Path, tag: str, with_training: bool, **options):
  """Writes adapter_TAG and ref_TAG.safetensors, and adds to meta.json."""
  batch = load_file(folder / 'ref_base.safetensors')
  inputs = {name: batch[name].long() for name in ('input_ids', 'attention_mask', 'labels')}
  load_base = lambda: transformers.AutoModelForCausalLM.from_pretrained(
    folder, attn_implementation='eager', dtype=torch.float32
  )
  config = peft.LoraConfig(lora_dropout=0.0, bias='none', task_type='CAUSAL_LM', **options)
  model = peft.get_peft_model(load_base(), config).eval()
  generator = torch.Generator().manual_seed(11)
  normal = lambda p: torch.randn(p.shape, generator=generator)
  with torch.no_grad():
    for name, p in model.named_parameters():
      if 'lora_magnitude' in name:
        p *= 1 + 0.2 * normal(p)
      elif 'lora_' in name:
        p.copy_(normal(p) * (0.2 if 'lora_A' in name else 0.1))
  model.save_pretrained(folder / f'adapter_{tag}')

  found = model(**inputs)
  found.loss.backward()
  reference = {'logits': found.logits.detach()[..., :COLUMNS]}
  trained = {
    name.replace('.default', '').replace('vector.weight', 'vector'): p
    for name, p in model.named_parameters()
    if p.requires_grad
  }
  meta = {'loss': float(found.loss)}
  meta['trainable'] = sum(p.numel() for p in trained.values())
  if with_training:
    reference |= {f'grad.{n}': p.grad.clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
      optimizer.zero_grad()
      loss = model(**inputs).loss
      losses.append(float(loss))
      loss.backward()
      optimizer.step()
    meta['adamw_losses'] = losses

  merged = peft.PeftModel.from_pretrained(load_base(), folder / f'adapter_{tag}').merge_and_unload()
  with torch.no_grad():
    logits = merged(**inputs).logits
  reference['merged_logits'] = logits[..., :COLUMNS]
  save_file(
    {name: x.contiguous() for name, x in reference.items()}, folder / f'ref_{tag}.safetensors'
  )
  path = folder / 'meta.json'
  all_meta = json.loads(path.read_text())
  all_meta |= {f'{tag}.{name}': x for name, x in meta.items()}
  path.write_text(json.dumps(all_meta, indent=1))


if __name__ == '__main__':
  root = Path(sys.argv[1])
  make(root / 'gemma3', 'dora', True, r=3, lora_alpha=6, target_modules=ALL, use_dora=True)
  make(
    root / 'gemma1',
    'patterns',
    False,
    r=4,
    lora_alpha=8,
    target_modules=ALL,
    rank_pattern={'layers.0.self_attn.q_proj': 2, 'up_proj': 5},
    alpha_pattern={'layers.1.mlp.down_proj': 3, 'v_proj': 20},
    use_rslora=True,
  )
