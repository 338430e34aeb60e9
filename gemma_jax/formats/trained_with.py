"""How the records of an adapter's training were rendered: gemma_jax.json.

    {"loss_on": "response", "parse_control_tokens": false, "seq_len": 512,
     "template": "dolly"}

The file is next to adapter_config.json, and PEFT ignores it; a model that an
adapter was merged into has it too. Generation and evaluation take their defaults
from it: a model prompted differently from how it was trained answers worse, and
nothing else would reveal that.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from pathlib import Path
from typing import Any

from absl import logging

from gemma_jax import files
from gemma_jax.config.train import DataConfig
from gemma_jax.data import templates
from gemma_jax.formats import hf_safetensors

NAME = 'gemma_jax.json'

_LOSS_ON = ('response', 'all')


@dataclasses.dataclass(frozen=True)
class TrainedWith:
  """Fields as in `DataConfig`, with its defaults.

  For a run, `seq_len` is the number of positions in its rows.
  """

  template: str = DataConfig.template
  loss_on: str = DataConfig.loss_on
  seq_len: int = DataConfig.seq_len
  parse_control_tokens: bool = DataConfig.parse_control_tokens

  @classmethod
  def of(cls, data: DataConfig) -> 'TrainedWith':
    """What a run trains with; its `seq_len` is set."""
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(**{name: getattr(data, name) for name in names})

  def write(self, folder: Path):
    """Writes gemma_jax.json."""
    text = files.to_json(dataclasses.asdict(self), NAME, indent=2, sort_keys=True)
    (folder / NAME).write_text(text + '\n', 'utf-8')

  @classmethod
  def read(cls, folder: Path) -> 'TrainedWith | None':
    """Reads it from the folder of an adapter or a model; None without gemma_jax.json.

    Raises:
      ValueError: it is broken, or has something that this version does not know.
    """
    path = folder / NAME
    if not path.is_file():
      return None
    raw = hf_safetensors.read_json(path)
    names = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(raw, dict) or raw.keys() != names:
      got = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
      raise _refused(path, f'fields {got!s:.200}', f'{sorted(names)}')
    try:
      templates.check_name(raw['template'])
    except (ValueError, TypeError) as e:
      raise ValueError(f'{path}: {e} {_REMEDY}') from None
    if raw['loss_on'] not in _LOSS_ON:
      raise _refused(path, f'loss_on={raw["loss_on"]!r:.80}', ' or '.join(_LOSS_ON))
    if type(raw['parse_control_tokens']) is not bool:
      got = raw['parse_control_tokens']
      raise _refused(path, f'parse_control_tokens={got!r:.80}', 'true or false')
    if type(raw['seq_len']) is not int or raw['seq_len'] < 0:
      raise _refused(path, f'seq_len={raw["seq_len"]!r:.80}', 'an integer >= 0')
    return cls(**raw)


_REMEDY = 'Remove the file to continue without it.'


def choose(by_adapter: Mapping[str, TrainedWith | None], told: Mapping[str, Any]) -> TrainedWith:
  """Chooses what adapters are measured with together, on the same tokens.

  Args:
    by_adapter: how each was trained, by its name; None if that is not known. A
      base with a merged adapter is one of them.
    told: a value for each field of `TrainedWith`, None to take the adapters';
      a seq_len of 0 is None.

  Returns:
    The told values, else the adapters' common ones, else the defaults; for
    seq_len the default is 0, which truncates no record: an adapter that was
    trained on short rows is measured on whole records like any other.

  Raises:
    ValueError: adapters differ in a field for which no value was told.
  """
  known = {name: t for name, t in by_adapter.items() if t is not None}
  told = {**told, 'seq_len': told['seq_len'] or None}
  chosen, taken = {}, {}
  for field in dataclasses.fields(TrainedWith):
    values = {name: getattr(t, field.name) for name, t in known.items()}
    value = told[field.name]
    if value is not None:
      _warn_unless_trained(values, field.name, value)
      chosen[field.name] = value
    elif values and field.name != 'seq_len':
      (first, value), *others = values.items()
      for name, other in others:
        if other != value:
          raise ValueError(
            f'--{field.name}: {first} was trained with {value}, {name} with '
            f'{other}, expected one for all, so that they are measured on the '
            f'same tokens. Set --{field.name}={value}, or measure them separately.'
          )
      chosen[field.name] = value
      taken[field.name] = first
  for name in [name for name in by_adapter if name not in known]:
    for field, first in taken.items():
      logging.warning(
        '%s has no %s: it is measured with %s=%s, as %s was trained',
        *(name, NAME, field, chosen[field], first),
      )
  return TrainedWith(**chosen)


def asked_with(
  names: Sequence[str],
  by_adapter: Mapping[str, TrainedWith | None],
  told: Mapping[str, Any],
  of_base: TrainedWith | None = None,
) -> dict[str, TrainedWith]:
  """How each is prompted: as it was trained, unless told otherwise.

  Args:
    names: of adapters, and of the base.
    by_adapter: how each adapter was trained; without the base.
    told: a value for fields of `TrainedWith`, None to take each adapter's own.
    of_base: how the adapter in the base was trained; None prompts the base like
      the first adapter.
  """
  told = {name: value for name, value in told.items() if value is not None}
  known = {n: t for n, t in by_adapter.items() if t}
  if of_base is not None:
    known |= {n: of_base for n in names if n not in by_adapter}
  for field, value in told.items():
    _warn_unless_trained({n: getattr(t, field) for n, t in known.items()}, field, value)
  own = {name: by_adapter[name] or TrainedWith() for name in by_adapter}
  if of_base is None:
    of_base = next((own[n] for n in names if n in own), TrainedWith())
  return {name: dataclasses.replace(own.get(name, of_base), **told) for name in names}


def _warn_unless_trained(values: Mapping[str, Any], field: str, value: Any):
  """Logs which adapters were trained with another value of a field."""
  for name, trained in values.items():
    if trained != value:
      logging.warning('--%s=%s: %s was trained with %s', field, value, name, trained)


def _refused(path: Path, got: str, expected: str) -> ValueError:
  return ValueError(f'{path}: got {got}, expected {expected}. {_REMEDY}')
