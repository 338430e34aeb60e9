"""Joins this process to the others of its run, by flags or by the TPU's word.

On a Cloud TPU VM nothing has to be said: every worker of a slice runs the same
command, and the environment tells each who it is. Elsewhere:

  --coordinator_address=HOST:PORT --num_processes=2 --process_id=0
"""

import glob
import os
import socket
import time

from absl import flags, logging
import jax

_COORDINATOR = flags.DEFINE_string(
    'coordinator_address', None, 'HOST:PORT of process 0. Default: what a TPU '
    'VM says of itself; elsewhere there is one process.',
)  # fmt: skip
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'How many processes run this command.'
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Which of them this is, from 0.'
)
_TIMEOUT_SECS = flags.DEFINE_integer(
  'join_timeout_secs', 300, 'How long to wait for the others at the start.'
)
_HEARTBEAT_SECS = flags.DEFINE_integer(
    'heartbeat_timeout_secs', 60, 'After so much silence a process counts as '
    'dead, and the others are aborted.',
)  # fmt: skip


def join() -> None:
  """Connects to the others; returns at once where there are none.

  Comes before anything that makes JAX look for devices.

  Raises:
    ValueError: flags that do not go together, or the coordinator or another
      process did not come before the time-out.
  """
  address = _COORDINATOR.value
  given = [f.value is not None for f in (_NUM_PROCESSES, _PROCESS_ID)]
  if address is None and not any(given):
    if not _is_tpu_vm():
      return
  elif address is None or not all(given):
    raise ValueError(
      f'--coordinator_address, --num_processes, --process_id: got {address}, '
      f'{_NUM_PROCESSES.value}, {_PROCESS_ID.value}, expected all three or '
      'none.'
    )
  elif not 0 <= _PROCESS_ID.value < _NUM_PROCESSES.value:
    raise ValueError(
      f'--process_id: got {_PROCESS_ID.value}, expected 0 to '
      f'{_NUM_PROCESSES.value - 1}, below --num_processes.'
    )
  else:
    _wait_for_coordinator(address)
  try:
    jax.distributed.initialize(
      address,
      _NUM_PROCESSES.value,
      _PROCESS_ID.value,
      initialization_timeout=_TIMEOUT_SECS.value,
      heartbeat_timeout_seconds=_HEARTBEAT_SECS.value,
      shutdown_timeout_seconds=_HEARTBEAT_SECS.value,
    )
  except RuntimeError as e:
    raise ValueError(
      f'--coordinator_address: not all of {_NUM_PROCESSES.value} processes '
      f'came to {address} within {_TIMEOUT_SECS.value} s ({e}).'
    ) from None
  if jax.process_index() > 0:  # process 0 logs for all
    logging.set_verbosity(logging.WARNING)


def _wait_for_coordinator(address: str) -> None:
  """ValueError if nobody answers at the address in time.

  JAX's own client ends the process when it cannot connect.
  """
  host, _, port = address.rpartition(':')
  if not host or not port.isdecimal():
    raise ValueError(
      f'--coordinator_address: got {address!r}, expected HOST:PORT.'
    )
  if _PROCESS_ID.value == 0:
    return  # it listens there itself
  deadline = time.monotonic() + _TIMEOUT_SECS.value
  while True:
    try:
      socket.create_connection((host, int(port)), timeout=5).close()
      return
    except OSError as e:
      if time.monotonic() > deadline:
        raise ValueError(
          f'--coordinator_address: {address} did not answer within '
          f'{_TIMEOUT_SECS.value} s ({e}); is process 0 running there?'
        ) from None
    time.sleep(0.2)


def _is_tpu_vm() -> bool:
  on_cpu = os.environ.get('JAX_PLATFORMS', '').startswith('cpu')
  devices = glob.glob('/dev/accel[0-9]*') + glob.glob('/dev/vfio/[0-9]*')
  return bool(devices) and not on_cpu
