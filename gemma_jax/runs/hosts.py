"""Several processes that train one run, and what they have to agree on.

Each process (a host of a pod slice) has its own devices and runs the same
program, so all must take the same decisions at the same point: one that leaves
the common path leaves the others waiting in a collective. Process 0 leads: it
alone logs and writes adapters, metrics and results. All write checkpoints.

With a single process nothing here communicates.
"""

from collections.abc import Callable, Mapping
import hashlib
import json
import secrets
import socket
import time
from typing import Any

from etils import epath
import jax
import numpy as np
import tqdm

from gemma_jax import files
from gemma_jax.config import train as config_lib

# How long another host's file may take to appear on a network disk.
_SHARED_DISK_SECS = 30


def is_lead() -> bool:
  """Whether this process logs and writes for all of them."""
  return jax.process_index() == 0


def any_of_them(local: Callable[[], bool]) -> Callable[[], bool]:
  """Whether `local` holds on any process; all of them must ask together."""
  if jax.process_count() == 1:
    return local
  return lambda: bool(_gather_flag(local()).any())


def check_agreement(what: str, value: Mapping[str, Any]) -> None:
  """ValueError, on every process, unless all have the same value.

  Args:
    what: the value's name in the message.
    value: JSON-able nested dicts.
  """
  if jax.process_count() == 1:
    return
  text = json.dumps(value, sort_keys=True)
  digests = _gather(hashlib.sha256(text.encode()).hexdigest().encode())
  other = next((i for i, d in enumerate(digests) if d != digests[0]), None)
  if other is None:
    return
  texts = _gather(text.encode())
  names = [name.decode() for name in _gather(socket.gethostname().encode())]
  first, second = (config_lib.flatten(json.loads(texts[i])) for i in (0, other))
  name = next(n for n in sorted(first.keys() | second.keys()) if first.get(n) != second.get(n))
  raise ValueError(
    f'{what}: {name} is {first.get(name)!r} on process 0 ({names[0]}, '
    f'fingerprint {digests[0][:16].decode()}) and {second.get(name)!r} on '
    f'process {other} ({names[other]}, fingerprint '
    f'{digests[other][:16].decode()}); start all with the same command and '
    'the same files.'
  )


def check_shared(folder: str) -> None:
  """ValueError, on every process, unless all see the same folder.

  The leading process puts a file there while the check lasts.
  """
  if jax.process_count() == 1:
    return
  token = _gather(secrets.token_hex(8).encode())[0].decode()
  probe = files.path(folder) / f'.shared-{token}'
  if is_lead():
    files.write(probe, token)
  wait_for_all('shared folder')
  seen = _gather_flag(_appears(probe))
  names = [name.decode() for name in _gather(socket.gethostname().encode())]
  if is_lead():
    probe.unlink()
  if not seen.all():
    blind = int(np.argmin(seen))
    raise ValueError(
      f'workdir: got {folder}, which process {blind} ({names[blind]}) does not '
      f'share with process 0 ({names[0]}); expected a folder that all hosts '
      'see, a network disk or gs://.'
    )


def wait_for_all(where: str) -> None:
  """Returns once every process is here."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(where)


def progress_bar(**options: Any) -> tqdm.tqdm:
  """A progress bar on the leading process, if there is a terminal."""
  return tqdm.tqdm(disable=None if is_lead() else True, **options)


def to_numpy(tree: Any) -> Any:
  """Arrays of any sharding, or NumPy's → NumPy arrays, on every process.

  All processes must call it at the same point.
  """
  return jax.tree.map(_whole, tree)


def _whole(x: jax.Array | np.ndarray) -> np.ndarray:
  if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  from jax.experimental import multihost_utils

  return multihost_utils.process_allgather(x, tiled=True)


def _gather_flag(flag: bool) -> np.ndarray:
  """Each process's flag, bool [processes]."""
  from jax.experimental import multihost_utils

  return np.ravel(multihost_utils.process_allgather(np.bool_(flag)))


def _gather(content: bytes) -> list[bytes]:
  """Each process's bytes, in the order of the processes."""
  from jax.experimental import multihost_utils

  gather = multihost_utils.process_allgather
  sizes = np.ravel(gather(np.int32(len(content))))
  padded = np.zeros(max(sizes), np.uint8)
  padded[: len(content)] = np.frombuffer(content, np.uint8)
  rows = gather(padded)
  return [row[:n].tobytes() for row, n in zip(rows, sizes, strict=True)]


def _appears(path: epath.Path) -> bool:
  deadline = time.monotonic() + _SHARED_DISK_SECS
  while not path.exists():
    if time.monotonic() > deadline:
      return False
    time.sleep(0.2)
  return True
