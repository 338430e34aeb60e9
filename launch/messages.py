"""Messages as a command says them: in one line, of its own flags, with what was meant."""

import dataclasses
import importlib
import re

from absl import flags

from gemma_jax.config.checks import did_you_mean, field_paths
from gemma_jax.config.sweep import GridConfig
from gemma_jax.config.train import TrainConfig

# Messages of ml_collections that `_explain` rewrites.
_NO_FIELD = re.compile(r"Field (\w+) not found .*'([\w.]+)\.(\w+)'")
_NO_PARENT = re.compile(r"Attribute <class '([\w.]+)\.(\w+)'>\.(\w+) does not exist")
_NO_FILE = re.compile(r"Failed loading config file .* '(.*)'", re.DOTALL)
_BROKEN_FILE = 'Error whilst parsing config file'

# A setting in a message: its name (not part of a path), perhaps with a value to
# set, or an argument at the start of the message.
_SETTING = re.compile(
  r'(?<![\w./\'"-])((?:data|model|lora|optimizer|mesh|grid)\.[a-z_0-9]+|eval_every_steps)'
  r'(?![\w/]|\.\w)(=(?! ))?'
  r'|^([a-z_]+)(?=: got )'
)
# Flags that name a field differently, in commands without a config.
_FLAG_OF = {
  'data.path': 'data',
  'data.global_batch_size': 'batch_size',
  'data.max_eval_records': 'max_records',
  'lora.path': 'adapter',
  'model.path': 'model',
  'model.dtype': 'weights',
}


def one_line(e: Exception) -> str:
  """Returns what an error says, without line breaks."""
  # str(KeyError) is the repr of its message.
  text = e.args[0] if isinstance(e, KeyError) and e.args else e
  text = own_flags(_explain(str(text)))
  return ' '.join(text.split()) or type(e).__name__


def own_flags(text: str) -> str:
  """Rewrites a message in the flags of this command, which may have no --config.

  data.seq_len of launch.train is --seq_len of launch.evaluate. In a command with
  a config, a flag is named if it was given, and a remedy, data.seq_len=512, is
  --config.data.seq_len=512.
  """

  def own(setting: re.Match) -> str:
    path, equals = setting[1] or setting[3], setting[2] or ''
    for name in (_FLAG_OF.get(path), path.rpartition('.')[2]):
      if name is None or name not in flags.FLAGS:
        continue
      if 'config' not in flags.FLAGS or flags.FLAGS[name].present:
        return f'--{name}{equals}'
    return f'--config.{setting[0]}' if equals and 'config' in flags.FLAGS else setting[0]

  return _SETTING.sub(own, text)


def _explain(text: str) -> str:
  """Says what is wrong with --config; leaves any other message unchanged."""
  # As in --config.lora.rnak=8 and --config.lroa.rank=8.
  text = _NO_PARENT.sub(r"Field \3 not found on dataclass <class '\1.\2'>", text)
  if match := _NO_FIELD.search(text):
    field, module, name = match.groups()
    kind = getattr(importlib.import_module(module), name)
    known = ', '.join(each.name for each in dataclasses.fields(kind))
    groups = {each.type: f'{each.name}.' for each in dataclasses.fields(TrainConfig)}
    own = field_paths(kind, (groups | {TrainConfig: '', GridConfig: 'grid.'})[kind])
    hint = did_you_mean(field, own) or did_you_mean(field, field_paths(TrainConfig))
    return f'--config: got the field {field!r}, expected one of {known}.{hint}'
  if match := _NO_FILE.search(text):
    return (
      f'--config: got {match[1]!r}, which is not a file; expected an experiment '
      'file with get_config(), e.g. experiments/dolly_lora.py.'
    )
  if _BROKEN_FILE in text:  # followed by a traceback
    return f'--config: {text.strip().splitlines()[-1]}.'
  return text
