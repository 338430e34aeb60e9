"""What a run leaves in its workdir, and who may continue it.

run.json          config and fingerprints, written before the first step
checkpoints/      Orbax, the newest two steps
adapter/          the last adapter, PEFT layout, when the run has finished
adapter_best/     the adapter with the least held-out loss so far
heldout/          step_N.jsonl: index, nll, tokens of every held-out record
metrics.jsonl     a line an update, one more per evaluation
tensorboard/      the same
result.json       the result line, when the run has finished
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import json
import os
from typing import Any

from etils import epath

from gemma_jax import config as config_lib
from gemma_jax import files, hosts, integrity
from gemma_jax.config import TrainConfig

# Changing these does not change what is learnt.
FREE_FIELDS = (
    'log_every_steps', 'profile_steps', 'compilation_cache', 'mesh',
    'checkpoint_every_steps', 'model.remat', 'model.attention',
)  # fmt: skip

# What may befall a disk, as the system names it.
_DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM,
    errno.ENOENT, errno.ENOTDIR, errno.EIO, errno.ESTALE,
)  # fmt: skip


def facts(
  config: TrainConfig, steps: int, fingerprints: dict[str, str]
) -> dict[str, Any]:
  """What `run.json` holds.

  Args:
    config: resolved.
    steps: updates that the config amounts to.
    fingerprints: of base, tokenizer and data.
  """
  return {
    'config': config_lib.to_dict(config),
    'steps': steps,
    'fingerprints': fingerprints,
  }


def check_same_config(workdir: str, config: TrainConfig) -> None:
  """ValueError if the workdir was made by another config; names the fields."""
  saved = _facts_to_keep(workdir)
  if saved is None:
    return
  check_same_fields(workdir, saved['config'], config_lib.to_dict(config))


def check_same_fields(
  workdir: str, before: dict[str, Any], now: dict[str, Any]
) -> None:
  """ValueError with the first field that decides a result and differs."""
  before, now = config_lib.flatten(before), config_lib.flatten(now)
  for name in sorted(before.keys() | now.keys()):
    if any(name == f or name.startswith(f'{f}.') for f in FREE_FIELDS):
      continue
    if before.get(name) != now.get(name):
      raise ValueError(
        f'workdir {workdir}: was made with {name}={before.get(name)!r}, this '
        f'config has {now.get(name)!r}. Use another workdir, or the same '
        'config.'
      )


def check_same_fingerprints(workdir: str, now: dict[str, str]) -> None:
  """ValueError if base, tokenizer or data are not those of the workdir."""
  saved = _facts_to_keep(workdir)
  if saved is None:
    return
  for name, before in saved['fingerprints'].items():
    if before != now[name]:
      raise ValueError(
        f'workdir {workdir}: its {name} had the fingerprint {before[:16]}, '
        f'the {name} of this run has {now[name][:16]}. Use another workdir, '
        f'or the same {name}.'
      )


def _facts_to_keep(workdir: str) -> dict[str, Any] | None:
  """run.json, if there is something that a run has finished or can resume."""
  path = files.path(workdir)
  has_steps = any(p.name.isdecimal() for p in path.glob('checkpoints/*'))
  if not has_steps and not (path / 'result.json').exists():
    return None
  return read_json(workdir, 'run.json')


def read_json(workdir: str, name: str) -> dict[str, Any] | None:
  """A JSON file of the workdir, or None if it is not there."""
  path = files.path(workdir) / name
  return json.loads(path.read_text()) if path.exists() else None


def write_json(workdir: str, name: str, value: dict[str, Any]) -> None:
  """Writes a JSON file whole or not at all."""
  files.write_json(files.path(workdir) / name, value)


def write_heldout(workdir: str, step: int, index, nll, tokens) -> None:
  """Keeps the losses of an evaluation by record, each [N], nats and tokens."""
  rows = [
    {'index': int(i), 'nll': float(n), 'tokens': int(t)}
    for i, n, t in zip(index, nll, tokens, strict=True)
  ]
  files.write_json_lines(_heldout(workdir, step), rows)


def read_heldout(workdir: str, step: int) -> list[dict[str, Any]]:
  """What `write_heldout` kept."""
  lines = _heldout(workdir, step).read_text().splitlines()
  return [json.loads(line) for line in lines]


def check_writable(workdir: str) -> None:
  """ValueError if the workdir cannot be made or written; writes nothing."""
  if files.is_remote(workdir):
    files.check_bucket(workdir)
    return
  path = files.absolute(workdir)
  while not path.exists():
    path = path.parent
  if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
    raise ValueError(
      f'workdir: got {workdir}, but {path} is not a folder that can be '
      'written to; expected one that can.'
    )


@contextlib.contextmanager
def only_run(workdir: str) -> Iterator[None]:
  """Keeps a second run out of the workdir, which is made if need be.

  The lock is the kernel's, on the folder itself: it leaves nothing behind and
  ends with the process, however that ends. An object store has none, nor do
  some network disks; there nobody is kept out.

  Raises:
    ValueError: another process trains in this workdir.
  """
  if files.is_remote(workdir) or not hosts.is_lead():
    yield
    return
  os.makedirs(workdir, exist_ok=True)
  folder = os.open(workdir, os.O_RDONLY)
  try:
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(folder)
    raise ValueError(
      f'workdir {workdir}: another process is training in it; wait until it '
      'has ended, or use another workdir.'
    ) from None
  except OSError:
    pass
  try:
    yield
  finally:
    os.close(folder)


def disk_error(workdir: str, e: Exception) -> OSError | None:
  """What a failure says of the workdir's disk; None if it is another one.

  Writers below us raise errors of their own kinds, with the words of the
  system somewhere in a long text. This is one line: what happened, which step
  is safe, and what to do.
  """
  words = _system_words(workdir, e)
  if words is None:
    return None
  step, _ = integrity.newest_good(files.path(workdir) / 'checkpoints')
  kept = 'no checkpoint' if step is None else f'the checkpoint of step {step}'
  return OSError(
    f'workdir {workdir}: {words}. It keeps {kept} and no half-written '
    'adapter; mend that and run the same command again.'
  )


def _system_words(workdir: str, e: Exception) -> str | None:
  """'No space left on device', or what else befell the disk."""
  if not files.path(workdir).exists():
    return os.strerror(errno.ENOENT)
  for number in _DISK_ERRORS:
    words = os.strerror(number)
    is_named = workdir in str(e) or number in (errno.ENOSPC, errno.EDQUOT)
    if is_named and (getattr(e, 'errno', None) == number or words in str(e)):
      return words
  return None


def _heldout(workdir: str, step: int) -> epath.Path:
  return files.path(workdir) / 'heldout' / f'step_{step}.jsonl'
