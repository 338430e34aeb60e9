"""A run of some seconds, started as a command, to be disturbed."""

import os
from pathlib import Path
import subprocess
import sys
import time

from etils import epath

from gemma_jax.runs import checksums
from tests import run_toy

ROOT = Path(__file__).parents[2]

# Half of the time of a run is start-up, the other half are these updates with
# a checkpoint and an evaluation at every few of them.
FIELDS = {'steps': 60, 'eval_every_steps': 9, 'checkpoint_every_steps': 3}

TIMEOUT_SECS = 600


class Runs:
  """Starts one and the same run in many workdirs.

  With several processes, each has one device, and the launcher starts all of
  them again when one has died.

  Attributes:
    folder: where all of it lies.
    seconds: that the undisturbed run took, with compiled programs at hand.
    adapter: the bytes that every run must end with.
  """

  def __init__(self, folder: Path, processes: int = 1):
    self.folder = folder
    self._processes = processes
    folder.mkdir(parents=True, exist_ok=True)
    records = run_toy.write_records(folder)
    self._config = run_toy.config_file(folder, records, **FIELDS)
    for name in ('compiles', 'undisturbed'):
      started = time.monotonic()
      code, log = self.finish(folder / name)
      if code != 0:
        raise RuntimeError(f'the undisturbed run failed:\n{log}')
      self.seconds = time.monotonic() - started
    self.adapter = adapter_bytes(folder / 'undisturbed')
    if adapter_bytes(folder / 'compiles') != self.adapter:
      raise RuntimeError('two undisturbed runs differ')

  def start(self, workdir: Path, log: Path | None = None) -> subprocess.Popen:
    """The command; its log goes to WORKDIR.log if it has no other place."""
    cache = {
      'JAX_PLATFORMS': 'cpu',
      'JAX_COMPILATION_CACHE_DIR': str(self.folder / 'cache'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }
    with (log or log_path(workdir)).open('wb') as file:
      return subprocess.Popen(
        self._command(workdir), cwd=ROOT, env=os.environ | cache, stdout=file, stderr=file
      )

  def _command(self, workdir: Path) -> list[str]:
    python = [sys.executable, '-m']
    train = [*python, 'launch.train', f'--config={self._config}']
    train.append(f'--workdir={workdir}')
    if self._processes == 1:
      return train
    count = self._processes
    several = [*python, 'launch.local_multihost', f'--processes={count}']
    train.append(f'--config.mesh.fsdp={count}')
    return [*several, '--devices=1', '--', *train]

  def finish(self, workdir: Path, log: Path | None = None) -> tuple[int, str]:
    """Runs the command to its end; (exit code, log)."""
    process = self.start(workdir, log)
    try:
      code = process.wait(TIMEOUT_SECS)
    finally:
      process.kill()
    return code, (log or log_path(workdir)).read_text()

  def is_equal(self, workdir: Path) -> bool:
    """Whether the run ended with the bytes it must end with."""
    return adapter_bytes(workdir) == self.adapter


def log_path(workdir: Path) -> Path:
  """Where the log of a run is: beside its workdir."""
  return workdir.with_name(f'{workdir.name}.log')


def adapter_bytes(workdir: Path) -> bytes | None:
  """The finished adapter, None if there is none."""
  path = workdir / 'adapter' / 'adapter_model.safetensors'
  return path.read_bytes() if path.exists() else None


def newest_step(workdir: Path) -> int:
  """The newest good checkpoint; 0 if there is none."""
  root = epath.Path(workdir) / 'checkpoints'
  return checksums.newest_good(root)[0] or 0


def phase(workdir: Path) -> str:
  """What a run was doing when it was stopped, from what it left behind."""
  log = log_path(workdir).read_text()
  if (workdir / 'result.json').exists():
    return 'ending'
  if list(workdir.glob('.adapter.*new')):
    return 'exporting'
  if list((workdir / 'checkpoints').glob('*-tmp')):
    return 'saving'
  for name, sign in (
    ('stepping', 'Compiled the evaluation step'),
    ('compiling', 'Loaded the base'),
    ('loading', 'Read the records'),
  ):
    if sign in log:
      return name
  return 'starting'
