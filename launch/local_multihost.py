"""Runs a command as several processes on this machine, as a pod slice would.

  python -m launch.local_multihost --processes=2 --devices=4 -- \\
      python -m launch.train --config=FILE --workdir=DIR

Each process has --devices CPU devices of its own and gets the flags of
`launch/multihost.py` added. Standard output is that of process 0; on standard
error each line begins with the number of its process.

A process that dies takes the others with it: they are aborted, and none of their
handlers runs. So all are restarted, up to --max_restarts times, unless the first
to end reported a user error (exit code 1) or that a signal stopped the run (75).
Signals are passed on to all processes.

Exit code: 0 if every process returned 0, else that of the process that ended
first, in a shell's notation (137 for a SIGKILL).
"""

from collections.abc import Sequence
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from absl import app, flags

_PROCESSES = flags.DEFINE_integer('processes', 2, 'How many.', lower_bound=1)
_DEVICES = flags.DEFINE_integer('devices', 4, 'CPU devices of each process.', lower_bound=1)
_MAX_RESTARTS = flags.DEFINE_integer(
  'max_restarts', 3, 'How often all processes may be restarted.', lower_bound=0
)

_USER_ERROR, _RESUMABLE = 1, 75
_HEARTBEAT_SECS = 10
# By then a process whose peer died has been aborted.
_GRACE_SECS = 3 * _HEARTBEAT_SECS


def threads(devices: int) -> int:
  """How many threads XLA needs for this many CPU devices: the value of NPROC.

  XLA starts as many threads as the larger of cores and devices. A device that
  waits in a collective keeps its thread, so with few cores all can wait while the
  one they wait for has no thread left to compute with; after 40 s XLA aborts.
  """
  return max(2 * devices, os.cpu_count() or 1)


class Job:
  """The processes of one start."""

  def __init__(self, command: Sequence[str], processes: int, devices: int):
    with socket.socket() as s:
      s.bind(('127.0.0.1', 0))
      address = f'127.0.0.1:{s.getsockname()[1]}'
    environment = os.environ | {
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': str(devices),
      'NPROC': str(threads(devices)),
    }
    self.processes = [
      subprocess.Popen(
        [
          *command,
          f'--coordinator_address={address}',
          f'--num_processes={processes}',
          f'--process_id={i}',
          f'--heartbeat_timeout_secs={_HEARTBEAT_SECS}',
        ],
        env=environment,
        stdout=None if i == 0 else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # we pass Ctrl-C on to them, once
      )
      for i in range(processes)
    ]
    _say('processes ' + ' '.join(str(p.pid) for p in self.processes))
    self._logs = [
      threading.Thread(target=_copy_log, args=(i, process), daemon=True)
      for i, process in enumerate(self.processes)
    ]
    for log in self._logs:
      log.start()

  def wait(self) -> int:
    """Waits until every process has ended; returns the job's exit code."""
    codes = [None]
    while None in codes and not any(codes):
      time.sleep(0.05)
      codes = [process.poll() for process in self.processes]
    # If several ended at once, the one that was killed is the cause.
    first = min(code for code in codes if code is not None)
    first = first if first < 0 else max(code or 0 for code in codes)
    deadline = time.monotonic() + _GRACE_SECS
    for process in self.processes:
      try:
        process.wait(max(0.0, deadline - time.monotonic()))
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for log in self._logs:
      log.join()
    return 128 - first if first < 0 else first

  def send(self, number: int) -> None:
    """Sends a signal to every running process."""
    for process in self.processes:
      if process.poll() is None:
        process.send_signal(number)


def run(command: Sequence[str], processes: int, devices: int, max_restarts: int) -> int:
  """Runs a command to its end, restarts included; returns its exit code."""
  stopped = []
  job = None

  def forward(number, frame):
    del frame
    stopped.append(number)
    if job is not None:
      job.send(number)

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, forward)
  for restarts in range(max_restarts + 1):
    job = Job(command, processes, devices)
    code = job.wait()
    if code in (0, _USER_ERROR, _RESUMABLE) or stopped:
      return code
    _say(f'a process ended with exit code {code}')
    if restarts < max_restarts:
      _say(f'restarting all of them ({restarts + 1} of {max_restarts})')
  return code


def main(argv: Sequence[str]) -> int:
  """Runs the command."""
  if len(argv) < 2:
    _say('command: missing, expected one after --; see --help')
    return _USER_ERROR
  return run(argv[1:], _PROCESSES.value, _DEVICES.value, _MAX_RESTARTS.value)


def _copy_log(index: int, process: subprocess.Popen) -> None:
  assert process.stderr is not None  # a pipe
  for line in process.stderr:
    sys.stderr.buffer.write(f'[{index}] '.encode() + line)
    sys.stderr.buffer.flush()


def _say(message: str) -> None:
  print(f'local_multihost: {message}', file=sys.stderr, flush=True)


if __name__ == '__main__':
  app.run(main)
