# ruff: noqa
"""Tiny Gemma 1/2/3 models + PEFT reference numerics -> argv[1]/<name>/"""

import os, json, shutil, torch, numpy as np, transformers, peft
from safetensors.torch import save_file
from transformers import (
  GemmaConfig,
  GemmaForCausalLM,
  Gemma2Config,
  Gemma2ForCausalLM,
  Gemma3TextConfig,
  Gemma3ForCausalLM,
)
from peft import LoraConfig, get_peft_model, PeftModel
import sys

ROOT = sys.argv[1]
base = dict(
  vocab_size=512,
  hidden_size=64,
  num_attention_heads=4,
  num_key_value_heads=1,
  head_dim=16,
  intermediate_size=128,
  max_position_embeddings=256,
  pad_token_id=0,
  eos_token_id=1,
  bos_token_id=2,
  attn_implementation='eager',
)
M = {
  'gemma1': (GemmaForCausalLM, lambda: GemmaConfig(num_hidden_layers=2, **base)),
  # gemma2: attn softcap 50, final softcap 30 in the real one; small caps here so that they bite; window 8 < seq
  'gemma2': (
    Gemma2ForCausalLM,
    lambda: Gemma2Config(
      num_hidden_layers=2,
      sliding_window=8,
      attn_logit_softcapping=5.0,
      final_logit_softcapping=3.0,
      query_pre_attn_scalar=24,
      **{**base, 'num_key_value_heads': 2},
    ),
  ),
  'gemma3': (
    Gemma3ForCausalLM,
    lambda: Gemma3TextConfig(
      num_hidden_layers=3,
      sliding_window=8,
      query_pre_attn_scalar=24,
      layer_types=['sliding_attention', 'sliding_attention', 'full_attention'],
      rope_parameters={
        'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e6},
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
      },
      tie_word_embeddings=True,
      **base,
    ),
  ),
}
ALL = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']


def rnd(m, seed):
  g = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for n, p in m.named_parameters():
      if 'norm' in n:
        p.copy_(torch.randn(p.shape, generator=g) * 0.3)  # non-zero so (1+w) matters
      else:
        p.copy_(
          torch.randn(p.shape, generator=g) * (0.25 if 'embed' in n else 2.0 / np.sqrt(p.shape[-1]))
        )


for name, (cls, cf) in M.items():
  D = f'{ROOT}/{name}'
  shutil.rmtree(D, ignore_errors=True)
  os.makedirs(D)
  m = cls(cf()).float().eval()
  rnd(m, 1)
  m.save_pretrained(D)
  rng = np.random.default_rng(0)
  ids = rng.integers(3, 512, (2, 24))
  mask = np.ones_like(ids)
  mask[1, 17:] = 0
  ids[1, 17:] = 0  # row 1 is right-padded
  X = torch.from_numpy(ids).long()
  AM = torch.from_numpy(mask).long()
  lab = X.clone()
  lab[AM == 0] = -100
  lab[0, :6] = -100  # prompt masked in row 0
  ref = {
    'input_ids': X.to(torch.int32),
    'attention_mask': AM.to(torch.int32),
    'labels': lab.to(torch.int32),
  }
  meta = {
    'transformers': transformers.__version__,
    'torch': torch.__version__,
    'peft': peft.__version__,
    'attn': 'eager',
    'dtype': 'float32',
    'loss': 'mean CE over shifted labels != -100',
    'note': 'row 1 right-padded from 17; logits at padded positions are not meaningful',
    'lora': {'r': 4, 'alpha': 8, 'dropout': 0},
  }
  with torch.no_grad():
    o = m(input_ids=X, attention_mask=AM, labels=lab)
    ref['base.logits'] = o.logits
    meta['base.loss'] = float(o.loss)
    h = m.model(input_ids=X, attention_mask=AM, output_hidden_states=True)
    for i, t in enumerate(h.hidden_states):
      ref[f'base.hidden.{i}'] = t
    x1 = X[:1, :10]
    gen = m.generate(
      x1, attention_mask=torch.ones_like(x1), max_new_tokens=20, min_new_tokens=20, do_sample=False
    )
    ref['base.greedy'] = gen.to(torch.int32)
    if name != 'gemma2':
      sdpa = cls.from_pretrained(D, attn_implementation='sdpa').float().eval()
      d = (sdpa(input_ids=X, attention_mask=AM).logits - o.logits)[AM.bool()].abs().max()
      meta['sdpa_vs_eager_max_abs'] = float(d)
  for tag, mods in (('qv', ['q_proj', 'v_proj']), ('all', ALL)):
    mm = cls.from_pretrained(D, attn_implementation='eager').float()
    pm = get_peft_model(
      mm,
      LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules=mods, bias='none', task_type='CAUSAL_LM'
      ),
    ).eval()
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
      for n, p in pm.named_parameters():
        if 'lora_' in n:
          p.copy_(torch.randn(p.shape, generator=g) * (0.2 if 'lora_A' in n else 0.1))
    A = f'{D}/adapter_{tag}'
    pm.save_pretrained(A)
    o = pm(input_ids=X, attention_mask=AM, labels=lab)
    o.loss.backward()
    R = {'logits': o.logits.detach()}
    from peft.utils import get_peft_model_state_dict

    for n, p in pm.named_parameters():
      if p.grad is not None:
        R['grad.' + n.replace('.default', '')] = p.grad.clone()
    meta[f'{tag}.loss'] = float(o.loss)
    meta[f'{tag}.trainable'] = sum(p.numel() for p in pm.parameters() if p.requires_grad)
    meta[f'{tag}.max_abs_delta_vs_base'] = float(
      (o.logits - ref['base.logits'])[AM.bool()].abs().max()
    )
    # 3 AdamW steps trajectory (torch.optim.AdamW lr 1e-2, wd 0, eps 1e-8, betas .9 .999)
    opt = torch.optim.AdamW(
      [p for p in pm.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    tl = []
    pm.zero_grad()
    for _ in range(4):
      l = pm(input_ids=X, attention_mask=AM, labels=lab).loss
      tl.append(float(l))
      l.backward()
      opt.step()
      opt.zero_grad()
    meta[f'{tag}.adamw_losses'] = tl
    # merge, from the saved adapter
    mm2 = cls.from_pretrained(D, attn_implementation='eager').float()
    mg = PeftModel.from_pretrained(mm2, A).merge_and_unload().eval()
    with torch.no_grad():
      R['merged_logits'] = mg(input_ids=X, attention_mask=AM).logits
      sd = mg.state_dict()
      R['merged.q0'] = sd['model.layers.0.self_attn.q_proj.weight'].clone()
      R['merged.v1'] = sd['model.layers.1.self_attn.v_proj.weight'].clone()
    meta[f'{tag}.merged_vs_active_max_abs'] = float(
      (R['merged_logits'] - R['logits'])[AM.bool()].abs().max()
    )
    save_file({k: v.contiguous() for k, v in R.items()}, f'{D}/ref_{tag}.safetensors')
  save_file({k: v.contiguous().clone() for k, v in ref.items()}, f'{D}/ref_base.safetensors')
  meta['params'] = sum(p.numel() for p in m.parameters())
  json.dump(meta, open(f'{D}/meta.json', 'w'), indent=1)
  print(name, json.dumps(meta))
