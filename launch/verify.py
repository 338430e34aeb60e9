"""Checks the checkpoints of a run, and on request its arithmetic.

  python -m launch.verify runs/mine [--replay]

One line per checkpointed step on standard output; exit code 1 if one is bad.
--replay recomputes the newest step from the one before and compares all bits.
"""

import sys

from absl import flags

from launch import app

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; may be given without the flag.')
_REPLAY = flags.DEFINE_bool('replay', False, 'Compute the newest step again and compare its bits.')


def main() -> int:
  """Runs the command."""
  from gemma_jax.runs import verify

  if not _WORKDIR.value:
    app.fail('--workdir: missing, expected the folder of a run')
  app.set_compilation_cache('')
  findings = []
  for finding in verify.check(_WORKDIR.value):
    print(finding, flush=True)
    findings.append(finding)
  if _REPLAY.value:
    findings.append(verify.replay(_WORKDIR.value))
    print(findings[-1])
  return 0 if all(finding.is_good for finding in findings) else 1


if __name__ == '__main__':
  # The workdir may be given without its flag.
  if len(sys.argv) > 1 and not sys.argv[1].startswith('-'):
    sys.argv[1] = f'--workdir={sys.argv[1]}'
  app.run(main)
