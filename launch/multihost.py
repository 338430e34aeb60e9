"""Joins this process to the others of its run, by flags or by what the TPU says.

On a Cloud TPU VM no flags are needed: every worker of a slice runs the same
command, and the environment tells each its place. Elsewhere:

  --coordinator_address=HOST:PORT --num_processes=2 --process_id=0
"""

import glob
import os
import re
import sys
import threading
from typing import NoReturn

from absl import flags, logging

_COORDINATOR = flags.DEFINE_string(
  'coordinator_address',
  None,
  'HOST:PORT of process 0. Default: as the TPU VM reports; elsewhere there is one process.',
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many processes run this command.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0.')
_TIMEOUT_SECS = flags.DEFINE_integer(
  'join_timeout_secs', 300, 'How long to wait for the other processes at the start.'
)
_HEARTBEAT_SECS = flags.DEFINE_integer(
  'heartbeat_timeout_secs',
  60,
  'After this long without a sign of life a process counts as dead, and the others are aborted.',
)


def join() -> None:
  """Connects to the other processes; returns at once if there are none.

  Must run before anything that makes JAX look for devices.

  If the coordinator or another process does not join before the time-out, this
  process says so and ends with exit code 1.

  Raises:
    ValueError: the flags do not go together.
  """
  address, count, index = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  if address is None and count is None and index is None:
    if not _is_tpu_vm():
      return
  elif address is None or count is None or index is None:
    raise ValueError(
      f'--coordinator_address, --num_processes, --process_id: got {address}, '
      f'{count}, {index}, expected all three or none.'
    )
  elif not 0 <= index < count:
    raise ValueError(
      f'--process_id: got {index}, expected 0 to {count - 1}, below --num_processes.'
    )
  elif not re.fullmatch(r'.+:\d+', address):
    raise ValueError(f'--coordinator_address: got {address!r}, expected HOST:PORT.')
  import jax  # late, so that signals are handled early

  # JAX itself would abort the process with a stack trace.
  timer = threading.Timer(_TIMEOUT_SECS.value, _give_up)
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      address,
      count,
      index,
      initialization_timeout=2 * _TIMEOUT_SECS.value + 10,
      heartbeat_timeout_seconds=_HEARTBEAT_SECS.value,
      shutdown_timeout_seconds=_HEARTBEAT_SECS.value,
    )
  except (ValueError, OSError) as e:
    if address is not None:
      raise
    # Not a Cloud TPU VM, or not one of several: a notebook's TPU, say.
    logging.info('This TPU names no other workers (%s).', e)
  finally:
    timer.cancel()
  if jax.process_index() > 0:  # process 0 logs for all
    logging.set_verbosity(logging.WARNING)


def _give_up() -> NoReturn:
  """Ends the process with one line, even if it waits in native code."""
  print(
    f'error: --coordinator_address: not all of the {_NUM_PROCESSES.value or ""}'
    f' processes reached {_COORDINATOR.value or "the first TPU worker"} within '
    f'{_TIMEOUT_SECS.value} s; is this command running for each of them?',
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)


def _is_tpu_vm() -> bool:
  on_cpu = os.environ.get('JAX_PLATFORMS', '').startswith('cpu')
  devices = glob.glob('/dev/accel[0-9]*') + glob.glob('/dev/vfio/[0-9]*')
  return bool(devices) and not on_cpu
