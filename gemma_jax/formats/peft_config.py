"""PEFT's adapter_config.json: what it says about each module, and back."""

from collections.abc import Collection
import dataclasses
import re
from typing import Any

from gemma_jax.config.lora import PROJECTIONS, TARGET_PRESETS, LoraConfig
from gemma_jax.formats import hub, module_regex, open_base

# Options that do not matter for a finished adapter.
_IGNORED = frozenset(
  {
    'auto_mapping',
    'base_model_name_or_path',
    'corda_config',
    'ensure_weight_tying',
    'eva_config',
    'inference_mode',
    'loftq_config',
    'lora_ga_config',
    'megatron_config',
    'megatron_core',
    'peft_type',
    'peft_version',
    'qalora_group_size',
    'revision',
    'runtime_config',
    'task_type',
  }
)
_HONOURED = frozenset(
  {
    'alpha_pattern',
    'bias',
    'exclude_modules',
    'init_lora_weights',
    'layers_pattern',
    'layers_to_transform',
    'lora_alpha',
    'lora_dropout',
    'r',
    'rank_pattern',
    'target_modules',
    'use_dora',
    'use_rslora',
  }
)

_MERGE = (
  'merge the adapter first, PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), '
  'ADAPTER).merge_and_unload().save_pretrained(OUTPUT), and give OUTPUT as the model'
)
_REMEDIES = {
  'lora_bias': "Gemma's layers have no bias that it could be merged into; train without it",
  'modules_to_save': _MERGE,
  'trainable_token_indices': _MERGE,
}

_MAX_RANK = 1 << 20
_MOST_NAMES = 1 << 12  # Gemma 3 27B has 434 modules
_REGEX = (
  f'a regex of up to {module_regex.MOST_CHARACTERS:,} characters, without backreferences, local '
  'flags and possessive parts'
)
_MAX_NUMBER = 1e38  # scales are applied in float32

# Our names → those on the Hub, which other tools look for.
_HUB_NAMES = {open_base.REAL_270M: 'google/gemma-3-270m'}

# Initializations of A and B that leave the base's weights unchanged.
_PLAIN_INITS = (None, True, False, 'gaussian', 'eva', 'orthogonal')


@dataclasses.dataclass(frozen=True)
class Module:
  """What an adapter says about one module: B A is multiplied by `scale`."""

  rank: int
  alpha: float
  scale: float


@dataclasses.dataclass(frozen=True)
class Options:
  """The options of an adapter that are honoured, named as in PEFT's file."""

  r: int
  lora_alpha: float
  use_rslora: bool
  use_dora: bool
  lora_dropout: float
  target_modules: str | list[str]
  exclude_modules: str | list[str]
  layers_to_transform: frozenset[int]  # empty means all
  rank_pattern: dict[str, int]
  alpha_pattern: dict[str, float]
  where: str
  matcher: module_regex.Matcher = dataclasses.field(default_factory=module_regex.Matcher)

  @classmethod
  def parse(cls, raw: Any, where: str) -> 'Options':
    """Checks a parsed adapter_config.json.

    Raises:
      ValueError: not a LoRA adapter, or an option that is not supported or has
        the wrong type; names the file and the option.
    """
    if not isinstance(raw, dict) or raw.get('peft_type') != 'LORA':
      raise ValueError(f'{where}: peft_type is not LORA; other adapters are not supported.')

    def check(name: str, ok: bool, expected: str):
      if not ok:
        raise ValueError(f'{where}: option {name} is {raw.get(name)!r:.80}, expected {expected}.')

    for name in sorted(raw.keys() - _IGNORED - _HONOURED):
      check(name, not raw[name], f'it unset; {_REMEDIES.get(name, "this option is not supported")}')
    check('bias', raw.get('bias', 'none') == 'none', "'none'")
    init = raw.get('init_lora_weights')
    check(
      'init_lora_weights',
      any(type(init) is type(x) and init == x for x in _PLAIN_INITS),
      f'one of {_PLAIN_INITS}; others also change the base',
    )
    layers = raw.get('layers_to_transform')
    if layers is not None:
      layers = layers if isinstance(layers, list) else [layers]
      check(
        'layers_to_transform',
        all(_is_index(i) for i in layers),
        'null, a layer or a list of layers',
      )
      check(
        'layers_pattern',
        raw.get('layers_pattern') in (None, '', [], 'layers', ['layers']),
        "null or 'layers', as Gemma's are called",
      )
    for name in ('use_dora', 'use_rslora'):
      check(name, isinstance(raw.get(name), bool | None), 'true or false')
    check('r', _is_rank(raw.get('r')), f'an integer from 1 to {_MAX_RANK}')
    check(
      'lora_alpha', _is_number(raw.get('lora_alpha')), f'a number of size {_MAX_NUMBER} at most'
    )
    check('lora_dropout', _is_number(raw.get('lora_dropout', 0.0)), 'a number')
    for name in ('target_modules', 'exclude_modules'):
      value = raw.get(name)
      check(
        name,
        value is None or _is_selection(value),
        f'a list of up to {_MOST_NAMES:,} names, or {_REGEX}',
      )
    for name, is_valid, largest in (
      ('rank_pattern', _is_rank, _MAX_RANK),
      ('alpha_pattern', _is_number, _MAX_NUMBER),
    ):
      value = {} if raw.get(name) is None else raw[name]
      check(
        name,
        isinstance(value, dict)
        and len(value) <= _MOST_NAMES
        and all(_is_ending(k) and is_valid(v) for k, v in value.items()),
        f'an object of up to {_MOST_NAMES:,} keys, each {_REGEX}, and numbers of size {largest} at '
        'most',
      )
    return cls(
      r=raw['r'],
      lora_alpha=float(raw['lora_alpha']),
      use_rslora=bool(raw.get('use_rslora')),
      use_dora=bool(raw.get('use_dora')),
      lora_dropout=float(raw.get('lora_dropout', 0.0)),
      target_modules=raw.get('target_modules') or [],
      exclude_modules=raw.get('exclude_modules') or [],
      layers_to_transform=frozenset(layers or ()),
      rank_pattern=raw.get('rank_pattern') or {},
      alpha_pattern=raw.get('alpha_pattern') or {},
      where=where,
    )

  def selects(self, module: str) -> bool:
    """Whether PEFT puts an adapter on the base's module of that name.

    `layers_to_transform` applies to names that are given only by their end.
    """
    targets, layers = self.target_modules, self.layers_to_transform
    if not self._selected(targets, module) or self._selected(self.exclude_modules, module):
      return False
    if not layers or isinstance(targets, str) or module in targets:
      return True
    layer = re.search(r'\blayers\.(\d+)\.', module)
    return layer is not None and int(layer[1]) in layers

  def module(self, module: str) -> Module:
    """Rank and scale of a module: the first pattern that matches its end."""
    rank = self._by_pattern(self.rank_pattern, module, self.r)
    alpha = self._by_pattern(self.alpha_pattern, module, self.lora_alpha)
    scale = alpha / (rank**0.5 if self.use_rslora else rank)
    return Module(rank, alpha, scale)

  def _selected(self, selection: str | list[str], module: str) -> bool:
    """PEFT's rule: a regex for the whole name, or the names' last parts."""
    if isinstance(selection, list):
      return any(module == s or module.endswith(f'.{s}') for s in selection)
    return selection.lower() == 'all-linear' or self._matches(selection, module, (0,))

  def _by_pattern(self, patterns: dict[str, Any], module: str, default: Any) -> Any:
    return next((v for k, v in patterns.items() if self._ends_like(k, module)), default)

  def _ends_like(self, pattern: str, module: str) -> bool:
    """PEFT's rule for the keys of rank_pattern and alpha_pattern: `(.*\\.)?(PATTERN)$`."""
    starts = (0, *(i + 1 for i, x in enumerate(module) if x == '.'))
    return self._matches(pattern, module, starts)

  def _matches(self, pattern: str, module: str, starts: Collection[int]) -> bool:
    try:
      return self.matcher.matches(pattern, module, starts)
    except ValueError as e:
      raise ValueError(f'{self.where}: {e}.') from None

  def check_patterns(self, modules: Collection[str]):
    """Raises ValueError for a pattern that matches none of these modules."""
    for option in ('rank_pattern', 'alpha_pattern'):
      for pattern in getattr(self, option):
        if not any(self._ends_like(pattern, module) for module in modules):
          raise ValueError(
            f'{self.where}: {option} {pattern!r:.80} matches no module of the '
            f'adapter, expected the end of a name such as {min(modules)}.'
          )

  def lora_config(self, modules: dict[str, Module]) -> LoraConfig:
    """The adapter as a LoraConfig; its scale is the common one.

    Args:
      modules: what the options say about each adapted module, by its path in the
        unrolled tree (layer_3/attn/q). If they agree, rank and alpha are theirs,
        else those that hold without a pattern.
    """
    rank, alpha = self.r, self.lora_alpha
    if len(distinct := set(modules.values())) == 1:
      (module,) = distinct
      rank, alpha = module.rank, module.alpha
    if alpha <= 0:  # 0 switches an adapter off: its factors are multiplied with it
      alpha = float(rank)
    ranks = {path: m.rank for path, m in modules.items() if m.rank != rank}
    adapted = {path.rpartition('/')[2] for path in modules}
    projections = [name for name in PROJECTIONS if name in adapted]
    pattern = '|'.join(projections)
    presets = {value: name for name, value in TARGET_PRESETS.items()}
    config = LoraConfig(
      rank=rank,
      alpha=alpha,
      scale_rule='alpha_over_sqrt_r' if self.use_rslora else 'alpha_over_r',
      targets=presets.get(pattern, pattern),
      dropout=self.lora_dropout,
      dora=self.use_dora,
      ranks=ranks,
    )
    try:
      config.check()
    except ValueError as e:
      raise ValueError(f'{self.where}: {e}') from None
    return config


def to_json(
  ranks: dict[str, int], targets: Collection[str], lora_config: LoraConfig, base_name: str
) -> dict[str, Any]:
  """The adapter_config.json of factors with `lora_config.scale`.

      ranks {'q_proj': 32, 'v_proj': 4}, rank 4, alpha 8, alpha_over_r
      → r 4, lora_alpha 8, rank_pattern {q_proj: 32}, alpha_pattern {q_proj: 64}

  Args:
    ranks: by module, or by the last part of the name if it holds for all layers.
    targets: the adapted modules, by the last part of the name if in all layers.
    lora_config: the rank, scale and dropout of the training run.
    base_name: of the base: a path, hf:OWNER/NAME[@REVISION], or one of our names.
  """
  _, _, revision = base_name.removeprefix(hub.PREFIX).partition('@')
  revision = revision if base_name.startswith(hub.PREFIX) else ''
  rank, scale = lora_config.rank, lora_config.scale
  own = {name: r for name, r in sorted(ranks.items()) if r != rank}
  # With patterns, plain alpha / r expresses any scale, and more readers know it.
  rslora = lora_config.scale_rule == 'alpha_over_sqrt_r' and not own
  if rslora or lora_config.scale_rule == 'alpha_over_r':
    alpha = lora_config.alpha
  else:
    alpha = scale * rank
  return {
    'alpha_pattern': {name: _whole(scale * r) for name, r in own.items()},
    'base_model_name_or_path': hub_name(base_name) or base_name,
    'bias': 'none',
    'fan_in_fan_out': False,
    'inference_mode': True,
    'init_lora_weights': True,
    'layers_to_transform': None,
    'lora_alpha': _whole(alpha),
    'lora_dropout': lora_config.dropout,
    'modules_to_save': None,
    'peft_type': 'LORA',
    'r': rank,
    'rank_pattern': own,
    'revision': revision or None,
    'target_modules': sorted(targets),
    'task_type': 'CAUSAL_LM',
    'use_dora': lora_config.dora,
    'use_rslora': rslora,
  }


def hub_name(reference: str) -> str:
  """The name of a base on the Hub, '' if it has none: hf:a/b@main → a/b."""
  if reference.startswith(hub.PREFIX):
    return reference.removeprefix(hub.PREFIX).partition('@')[0]
  return _HUB_NAMES.get(reference, '')


def _whole(x: float) -> int | float:
  return int(x) if x == int(x) else x


def _is_number(x: Any) -> bool:
  if not isinstance(x, int | float) or isinstance(x, bool):
    return False
  return abs(x) <= _MAX_NUMBER  # False for NaN


def _is_index(x: Any) -> bool:
  return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _is_rank(x: Any) -> bool:
  return _is_index(x) and 1 <= x <= _MAX_RANK


def _is_ending(x: Any) -> bool:
  """Whether it is a regex, and still one as PEFT uses it."""
  return module_regex.is_regex(x) and module_regex.is_regex(rf'(.*\.)?({x})$')


def _is_selection(x: Any) -> bool:
  if isinstance(x, list):
    return len(x) <= _MOST_NAMES and all(isinstance(name, str) for name in x)
  return module_regex.is_regex(x)
