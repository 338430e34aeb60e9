"""Hugging Face's config.json, both dialects, to a `ModelConfig` and back.

Released Gemma folders have the old dialect (`rope_theta`, `rope_scaling`,
`sliding_window_pattern`), transformers 5 writes the new one
(`rope_parameters`, `layer_types`). Fields that a file leaves out take the
defaults of the transformers class it was made with; tensor shapes are checked
against the result, so a wrong guess cannot pass.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from gemma_jax.formats import base_source
from gemma_jax.model import variants
from gemma_jax.model.config import ModelConfig

_COMMON = {'head_dim': 256, 'rms_norm_eps': 1e-6}
_DEFAULTS = {
  'gemma': {**_COMMON, 'max_position_embeddings': 8192},
  'gemma2': {
    **_COMMON,
    'max_position_embeddings': 8192,
    'query_pre_attn_scalar': 256,
    'sliding_window': 4096,
    'attn_logit_softcapping': 50.0,
    'final_logit_softcapping': 30.0,
  },
  # The text_config of the multimodal sizes holds little more than what
  # differs from these.
  'gemma3_text': {
    **_COMMON,
    'vocab_size': 262_208,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'max_position_embeddings': 131_072,
    'query_pre_attn_scalar': 256,
    'sliding_window': 4096,
  },
}

_CLASSES = {
  'gemma': 'GemmaForCausalLM',
  'gemma2': 'Gemma2ForCausalLM',
  'gemma3_text': 'Gemma3ForCausalLM',
}

_SIZES = {
  'vocab_size': 'vocab_size',
  'embed_dim': 'hidden_size',
  'hidden_dim': 'intermediate_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'num_kv_heads': 'num_key_value_heads',
  'head_dim': 'head_dim',
  'norm_eps': 'rms_norm_eps',
  'max_positions': 'max_position_embeddings',
}


def model_config(raw: Any, num_tensors: int, where: str) -> ModelConfig:
  """The architecture that a parsed config.json describes.

  Args:
    raw: the JSON object; of a multimodal Gemma 3 the `text_config` is taken.
    num_tensors: how many tensors there are; more layers than that are rejected.
    where: the file, for messages.

  Raises:
    ValueError: another architecture, or a setting that Gemma does not have;
      names the file, the field, its value and what is expected.
  """
  if not isinstance(raw, dict):
    raise ValueError(f'{where}: expected a JSON object.')
  outer, kind = raw, raw.get('model_type')
  if kind == 'gemma3':
    raw = raw.get('text_config')
    if not isinstance(raw, dict):
      raise ValueError(f'{where}: model_type gemma3 without a text_config.')
    kind = 'gemma3_text'
  if not isinstance(kind, str) or kind not in _DEFAULTS:
    raise ValueError(
      f'{where}: model_type is {kind!r:.80}, expected gemma, gemma2, gemma3_text '
      'or gemma3; other architectures are not supported.'
    )
  config = {**_DEFAULTS[kind], **raw}
  _check_switches(config, outer, kind, where)
  missing = [key for key in _SIZES.values() if key not in config]
  if missing:
    raise ValueError(f'{where}: field {missing[0]} is missing.')
  fields = {ours: config[theirs] for ours, theirs in _SIZES.items()}
  fields['norm_eps'] = _positive(config, 'rms_norm_eps', where)
  base_source.check_layer_count(fields['num_layers'], num_tensors, where)
  fields.update(_rope(config, kind, where))
  if kind != 'gemma':
    fields['use_post_norms'] = True
    fields['layer_is_local'] = _pattern(config, kind, where)
    fields['window_size'] = config.get('sliding_window')
    for ours, theirs in (
      ('attention_softcap', 'attn_logit_softcapping'),
      ('final_softcap', 'final_logit_softcapping'),
    ):
      if config.get(theirs) is not None:
        fields[ours] = _positive(config, theirs, where)
    scalar = _positive(config, 'query_pre_attn_scalar', where)
    if scalar != config['head_dim']:
      fields['query_scale'] = scalar**-0.5
  fields['use_qk_norm'] = kind == 'gemma3_text'
  try:
    return ModelConfig(**fields)
  except ValueError as e:
    raise ValueError(f'{where}: {e}') from None


def _check_switches(config: dict[str, Any], outer: dict[str, Any], kind: str, where: str):
  """Rejects settings that no Gemma checkpoint has and this model does not support."""
  # Gemma 1 was released with hidden_act 'gelu' but trained with tanh GELU;
  # hidden_activation, if present, means what it says.
  allowed = {
    'hidden_act': (None, 'gelu', 'gelu_pytorch_tanh'),
    'hidden_activation': (None, 'gelu_pytorch_tanh'),
    'attention_bias': (None, False),
    'tie_word_embeddings': (None, True),
    'use_bidirectional_attention': (None, False),
  }
  for key, values in allowed.items():
    for part in (config, outer):
      if part.get(key) not in values:
        raise ValueError(
          f'{where}: {key} is {part[key]!r:.80}, expected one of {values}; this '
          f'is not a {kind} language model that can be read.'
        )


def _pattern(config: dict[str, Any], kind: str, where: str) -> tuple[bool, ...]:
  """Which layers are local: as listed, or by the architecture's rule."""
  num_layers = config['num_hidden_layers']
  listed = config.get('layer_types')
  if listed is None:
    period = 2
    if kind == 'gemma3_text':
      period = config.get('sliding_window_pattern')
      period = period or config.get('_sliding_window_pattern') or 6
    if not isinstance(period, int) or period < 1:
      raise ValueError(
        f'{where}: sliding_window_pattern is {period!r:.80}, expected an integer >= 1.'
      )
    return variants.alternating(num_layers, period - 1)
  names = ('full_attention', 'sliding_attention')
  if not isinstance(listed, list) or any(name not in names for name in listed):
    raise ValueError(
      f'{where}: layer_types is {listed!r:.80}, expected a list of {" and ".join(names)}.'
    )
  return tuple(name == 'sliding_attention' for name in listed)


def _rope(config: dict[str, Any], kind: str, where: str) -> dict[str, float]:
  """RoPE bases and scale, from either dialect."""
  parameters = config.get('rope_parameters')
  is_gemma3 = kind == 'gemma3_text'
  if parameters is None:  # the old dialect
    scaling = config.get('rope_scaling') or {}
    theta = config.get('rope_theta', 1_000_000.0 if is_gemma3 else 10_000.0)
    full = {**_object(scaling, 'rope_scaling', where), 'rope_theta': theta}
    local = {'rope_theta': config.get('rope_local_base_freq', 10_000.0)}
  elif is_gemma3:
    entries = _object(parameters, 'rope_parameters', where)
    full = _object(entries.get('full_attention'), 'full_attention', where)
    local = _object(entries.get('sliding_attention'), 'sliding_attention', where)
  else:
    full, local = _object(parameters, 'rope_parameters', where), {}
  rope = {
    'rope_theta': _positive(full, 'rope_theta', where),
    'rope_scale': _linear_factor(full, where),
  }
  if is_gemma3:
    rope['rope_local_theta'] = _positive(local, 'rope_theta', where)
  # Only Gemma 3 keeps the positions of local layers unscaled.
  scaled = local if is_gemma3 else full if kind == 'gemma2' else {}
  if _linear_factor(scaled, where) != 1.0:
    raise ValueError(
      f'{where}: RoPE of local layers is scaled ({scaled!r:.80}), expected rope type default.'
    )
  return rope


def _linear_factor(rope: dict[str, Any], where: str) -> float:
  kind = rope.get('rope_type', rope.get('type')) or 'default'
  if kind == 'default':
    return 1.0
  if kind != 'linear':
    raise ValueError(f'{where}: rope_type is {kind!r:.80}, expected default or linear.')
  return _positive(rope, 'factor', where)


def _object(value: Any, name: str, where: str) -> dict[str, Any]:
  if not isinstance(value, dict):
    raise ValueError(f'{where}: {name} is {value!r:.80}, expected a JSON object.')
  return value


def _positive(config: dict[str, Any], key: str, where: str) -> float:
  value = config.get(key)
  is_flag = isinstance(value, bool)
  if is_flag or not isinstance(value, int | float) or not 0 < value < 1e300:
    raise ValueError(f'{where}: {key} is {value!r:.80}, expected a number > 0.')
  return float(value)


def to_json(config: ModelConfig, dtype: np.dtype) -> dict[str, Any]:
  """The config.json of an architecture, in both dialects at once.

  transformers 5 takes `rope_parameters` and `layer_types`, older releases
  `rope_theta` and its companions; the two say the same, so that either loads the
  folder.

  Args:
    config: a Gemma 1, 2 or 3.
    dtype: of the weights beside it.

  Raises:
    ValueError: no Gemma class of transformers has this architecture; names the
      field.
  """
  kind = 'gemma3_text' if config.use_qk_norm else 'gemma2'
  if not (config.use_qk_norm or config.use_post_norms):
    kind = 'gemma'
  raw = {theirs: getattr(config, ours) for ours, theirs in _SIZES.items()}
  raw |= {
    'model_type': kind,
    'architectures': [_CLASSES[kind]],
    'attention_bias': False,
    'attention_dropout': 0.0,
    'bos_token_id': 2,
    'dtype': dtype.name,
    'eos_token_id': 1,
    'hidden_activation': 'gelu_pytorch_tanh',
    'initializer_range': 0.02,
    'pad_token_id': 0,
    'tie_word_embeddings': True,
    'torch_dtype': dtype.name,
    'use_cache': True,
  }
  scaling = None
  if config.rope_scale != 1.0:
    scaling = {'rope_type': 'linear', 'factor': config.rope_scale}
  full = {'rope_theta': config.rope_theta, **(scaling or {'rope_type': 'default'})}
  raw |= {'rope_theta': config.rope_theta, 'rope_scaling': scaling}
  raw['rope_parameters'] = full
  if kind == 'gemma':
    raw['hidden_act'] = 'gelu_pytorch_tanh'
  else:
    scalar = config.head_dim
    if config.query_scale is not None:
      scalar = config.query_scale**-2
      # 255.99999999999997 comes of the root of 256.
      scalar = round(scalar) if math.isclose(scalar, round(scalar)) else scalar
    pattern = config.layer_is_local or (False,) * config.num_layers
    raw |= {
      'attn_logit_softcapping': config.attention_softcap,
      'final_logit_softcapping': config.final_softcap,
      'layer_types': ['sliding_attention' if local else 'full_attention' for local in pattern],
      'query_pre_attn_scalar': scalar,
      'sliding_window': config.window_size,
    }
  if kind == 'gemma3_text':
    local_theta = config.rope_local_theta or config.rope_theta
    raw['rope_local_base_freq'] = local_theta
    raw['rope_parameters'] = {
      'full_attention': full,
      'sliding_attention': {'rope_type': 'default', 'rope_theta': local_theta},
    }
    period = pattern.index(False) + 1 if False in pattern else len(pattern) + 1
    if pattern == variants.alternating(len(pattern), period - 1):
      raw['sliding_window_pattern'] = period
  _check_says(raw, config)
  return raw


def _check_says(raw: dict[str, Any], config: ModelConfig):
  """Raises ValueError unless the JSON, read back, gives the architecture."""

  def plain(c: ModelConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(c)
    fields['query_scale'] = c.query_scale or c.head_dim**-0.5
    fields['rope_local_theta'] = c.rope_local_theta or c.rope_theta
    fields['local rope_scale'] = 1.0 if c.rope_local_theta else c.rope_scale
    if not any(c.layer_is_local or ()):  # then none of these is used
      fields |= dict.fromkeys(
        ('layer_is_local', 'window_size', 'rope_local_theta', 'local rope_scale')
      )
    return fields

  want = plain(config)
  got = plain(model_config(raw, config.num_layers, 'config.json'))
  for field, value in want.items():
    same = got[field] == value
    if isinstance(value, float) and isinstance(got[field], float):
      same = math.isclose(got[field], value, rel_tol=1e-5)
    if not same:
      raise ValueError(
        f'{field}: got {value!r}, expected {got[field]!r}; config.json of '
        f'{raw["model_type"]} cannot express anything else, so this architecture '
        'has no Hugging Face form.'
      )
