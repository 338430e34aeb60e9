"""Typed configuration: what a run is made of, checked in one place.

A `TrainConfig` is a tree of small mutable dataclasses, so that
`ml_collections.config_flags` can override any field from the command line
(`--config.lora.rank=8`) and a misspelt field fails. Overrides do not rerun
`__post_init__`, hence `resolve()`: it validates every field once and returns a
frozen deep copy.

The architecture is not part of it: a `model.config.ModelConfig` comes from a
checkpoint or from `model/variants.py`, and never from a flag.
"""

import copy
import dataclasses
import json
import math
from typing import Any

from gemma_jax.config import checks
from gemma_jax.config.checks import Freezable, at_least, check_choices, check_regex, choice, require
from gemma_jax.config.lora import LoraConfig


@dataclasses.dataclass
class BaseConfig(Freezable):
  """Which base model, and how it is computed (`config.model`).

  Attributes:
    path: model reference: `gemma3_270m`, a .gguf file, a Hugging Face or Flax
      release folder, `hf:owner/name[@revision]`, or `random:VARIANT`.
    tokenizer: path of a tokenizer.model; '' takes the one beside the weights.
    dtype: of the base in memory: auto (the file's own; float32 if dequantized),
      bfloat16 or float32.
    activation_dtype: auto is bfloat16 on TPU and GPU, float32 on CPU.
    scan_layers: one compiled layer, scanned; False unrolls (`layer_0/...`).
    attention: auto (splash on TPU, cudnn on GPU where it can, blocks on CPU),
      one of these by name, or einsum.
    remat: what the backward pass recomputes: full (all but each layer's input),
      dots (all but products with weights), none, or auto: dots if it fits in
      memory, else full.
  """

  path: str = 'gemma3_270m'
  tokenizer: str = ''
  dtype: str = choice('auto', 'auto', 'bfloat16', 'float32')
  activation_dtype: str = choice('auto', 'auto', 'bfloat16', 'float32')
  scan_layers: bool = True
  attention: str = choice('auto', 'auto', 'einsum', 'blocks', 'splash', 'cudnn')
  remat: str = choice('auto', 'auto', 'full', 'dots', 'none')

  def check(self):
    require(bool(self.path), 'model.path', self.path, 'a model reference')
    check_choices(self, 'model', {'float16': 'float16 overflows in Gemma.'})


@dataclasses.dataclass
class OptimizerConfig(Freezable):
  """AdamW on the trainable leaves.

  Attributes:
    learning_rate: peak.
    schedule: constant, linear or cosine, after the warm-up; the last two would
      reach zero at the update after the last.
    warmup_steps: updates of linear warm-up; the first has peak / warmup_steps.
    weight_decay: decoupled, on every trainable leaf but norm scales
      and magnitudes.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    clip_norm: largest global norm of the gradient; 0 switches clipping off.
    accumulate_steps: parts in which a global batch is computed.
  """

  learning_rate: float = 5e-5
  schedule: str = choice('constant', 'constant', 'linear', 'cosine')
  warmup_steps: int = 0
  weight_decay: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  clip_norm: float = 1.0
  accumulate_steps: int = 1

  def check(self):
    require(
      0 < self.learning_rate < math.inf,
      'optimizer.learning_rate',
      self.learning_rate,
      'a number > 0',
    )
    check_choices(self, 'optimizer')
    at_least('optimizer.warmup_steps', self.warmup_steps, 0)
    for name in ('weight_decay', 'clip_norm'):
      value = getattr(self, name)
      require(value >= 0, f'optimizer.{name}', value, 'a number >= 0')
    for name in ('b1', 'b2'):
      value = getattr(self, name)
      require(0 <= value < 1, f'optimizer.{name}', value, 'a number in [0, 1)')
    require(self.eps > 0, 'optimizer.eps', self.eps, 'a number > 0')
    at_least('optimizer.accumulate_steps', self.accumulate_steps, 1)


@dataclasses.dataclass
class MeshConfig(Freezable):
  """Devices along each mesh axis; -1, at most once, takes all that are left.

  Attributes:
    data: replicas; with several slices, a multiple of their number.
    fsdp: parts of parameters and batch.
    tensor: parts of heads, MLP width and vocabulary.
    shard_adapter: split the adapter as the base is split; else each device has
      all of it.
  """

  data: int = 1
  fsdp: int = -1
  tensor: int = 1
  shard_adapter: bool = False

  def check(self):
    sizes = (self.data, self.fsdp, self.tensor)
    for name, size in zip(('data', 'fsdp', 'tensor'), sizes, strict=True):
      if size != -1:
        at_least(f'mesh.{name}', size, 1, '-1 takes what is left.')
    require(sizes.count(-1) <= 1, 'mesh', sizes, 'at most one axis of size -1')


@dataclasses.dataclass
class DataConfig(Freezable):
  """Records, and how they become rows.

  Attributes:
    path: a .jsonl, .jsonl.gz or .jsonl.xz file, `tfds:NAME`, or
      `sample:seoul_travel`.
    eval_path: held-out records; '' takes the source's own validation split, or
      else 5 % of the records by a hash of (instruction, context).
    template: dolly, chat, plain, or one of the tasks in `data/templates.py`.
    loss_on: response, or all (every token of the record, as in the tutorial).
    parse_control_tokens: parse control tokens that a text spells (one rendered
      elsewhere, say) as such tokens; False reads them as plain text.
    seq_len: T, positions in a row; 0 is 512, or as many as the base has if
      these are fewer.
    global_batch_size: rows in an update, over all devices.
    packing: fill rows with several records, kept apart by segment ids; False
      pads every record to a row of its own.
    with_context: False leaves out records that have a context.
    max_records: use only this many of the first training records; 0 is all.
    max_eval_records: use only this many of the first held-out records; 0 is all.
    skip_bad_records: drop and count unusable records instead of stopping.
    order_seed: of the order of the records; -1 takes the run's seed, any other
      value keeps the order while seeds change.
  """

  path: str = 'sample:seoul_travel'
  eval_path: str = ''
  template: str = 'dolly'
  loss_on: str = choice('response', 'response', 'all')
  parse_control_tokens: bool = False
  seq_len: int = 0
  global_batch_size: int = 4
  packing: bool = True
  with_context: bool = True
  max_records: int = 0
  max_eval_records: int = 0
  skip_bad_records: bool = False
  order_seed: int = -1

  def check(self):
    require(bool(self.path), 'data.path', self.path, 'a file or tfds:NAME')
    check_choices(self, 'data')
    at_least('data.seq_len', self.seq_len, 0)
    require(self.seq_len != 1, 'data.seq_len', 1, '0 or an integer >= 2')
    at_least('data.global_batch_size', self.global_batch_size, 1)
    for name in ('max_records', 'max_eval_records'):
      at_least(f'data.{name}', getattr(self, name), 0)
    at_least('data.order_seed', self.order_seed, -1)


@dataclasses.dataclass
class TrainConfig(Freezable):
  """Everything that determines a run's result, and what it leaves behind.

  Attributes:
    seed: of the data order, the initial A and dropout.
    steps: updates; 0 means as many as `epochs` takes.
    epochs: passes over the training records, when steps is 0.
    eval_every_steps: updates between evaluations; 0 means only at the ends.
    checkpoint_every_steps: updates between checkpoints; 0 means only the last.
    early_stopping_evals: stop after this many evaluations without a new best
      loss, which needs `eval_every_steps`; 0 never stops early.
    max_skipped_batches: skip at most this many batches whose loss or gradient is
      not finite, logging the records of each; one more stops the run.
    log_every_steps: updates between log lines (the metrics file has them all).
    profile_steps: updates to trace with jax.profiler, e.g. (3, 4).
    trainable: regexes over tree paths ('params/...' is the base, 'lora/...'
      the adapter); a leaf that one of them matches from its start is trained.
    compilation_cache: folder of compiled programs; '' is
      ~/.cache/gemma_jax/compiled, 'off' keeps none.
  """

  seed: int = 0
  steps: int = 0
  epochs: float = 1.0
  eval_every_steps: int = 0
  checkpoint_every_steps: int = 100
  early_stopping_evals: int = 0
  max_skipped_batches: int = 0
  log_every_steps: int = 10
  profile_steps: tuple[int, ...] = ()
  trainable: tuple[str, ...] = ('lora/',)
  compilation_cache: str = ''
  model: BaseConfig = dataclasses.field(default_factory=BaseConfig)
  lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)

  def resolve(self) -> 'TrainConfig':
    """Returns a checked, frozen copy; ValueError on the first bad field.

    Call it once, after the last override. Nothing downstream checks again.
    """
    config = copy.deepcopy(self)
    checks.seed(config.seed)
    for name in (
      'steps',
      'eval_every_steps',
      'checkpoint_every_steps',
      'early_stopping_evals',
      'max_skipped_batches',
    ):
      at_least(name, getattr(config, name), 0)
    # With evaluations only at the ends it would never stop, and nobody would know.
    require(
      not config.early_stopping_evals or config.eval_every_steps > 0,
      'early_stopping_evals',
      config.early_stopping_evals,
      '0 while eval_every_steps is 0, since nothing is evaluated before the end',
      'Set e.g. eval_every_steps=100.',
    )
    require(
      all(isinstance(step, int) and step >= 0 for step in config.profile_steps),
      'profile_steps',
      config.profile_steps,
      'integers >= 0',
    )
    require(
      config.steps > 0 or 0 < config.epochs < math.inf,
      'epochs',
      config.epochs,
      'a number > 0, since steps is 0',
    )
    at_least('log_every_steps', config.log_every_steps, 1)
    # A lone string would be taken letter by letter, and 'p' is all of params/.
    require(
      isinstance(config.trainable, tuple | list) and len(config.trainable) > 0,
      'trainable',
      config.trainable,
      'a tuple of regexes, at least one',
    )
    for pattern in config.trainable:
      check_regex('trainable', pattern)
    parts = (config.model, config.lora, config.optimizer, config.mesh, config.data)
    for part in parts:
      part.check()
    divisor = config.optimizer.accumulate_steps
    require(
      config.data.global_batch_size % divisor == 0,
      'data.global_batch_size',
      config.data.global_batch_size,
      f'a multiple of optimizer.accumulate_steps={divisor}',
    )
    for part in (config, *parts):
      part.freeze()
    return config


def to_dict(config: Any) -> dict[str, Any]:
  """A dataclass as JSON-able nested dicts (tuples become lists)."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def flatten(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """{'lora': {'rank': 8}} → {'lora.rank': 8}."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def from_dict(tree: Any, into: Any = None, where: str = '') -> Any:
  """Undoes `to_dict`; the config is not resolved.

  Args:
    tree: of a `TrainConfig`, as JSON has it.
    into: the dataclass that takes the values; None is a new `TrainConfig`.
    where: its name and a dot, for messages.

  Raises:
    ValueError: an unknown field, or a value of another type.
  """
  config = TrainConfig() if into is None else into
  place = where.rstrip('.') or 'config'
  require(isinstance(tree, dict), place, tree, 'an object')
  known = {field.name for field in dataclasses.fields(config)}
  for name, value in tree.items():
    if name not in known:
      raise ValueError(
        f'{place}: got the field {name!r}, expected one of '
        f'{", ".join(sorted(known))}; was it written by another version?'
      )
    old = getattr(config, name)
    if dataclasses.is_dataclass(old):
      from_dict(value, old, f'{where}{name}.')
      continue
    value = tuple(value) if isinstance(value, list) else value
    value = float(value) if type(value) is int and type(old) is float else value
    require(
      type(value) is type(old), f'{where}{name}', value, f'a value of type {type(old).__name__}'
    )
    setattr(config, name, value)
  return config
