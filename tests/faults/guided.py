"""Inputs mutated towards code that has not run yet, by atheris (optional).

  pip install atheris
  python -m tests.faults.guided FORMAT RUNS SEED FOLDER

Ends with the first input that a reader takes in another way than reading or
refusing it; libFuzzer prints it and exits with another code than 0.
"""

from pathlib import Path
import shutil
import sys

import atheris

with atheris.instrument_imports(include=['gemma_jax']):
  from tests.faults import corpora, worker


def main(kind: str, runs: str, seed: str, root: Path) -> None:
  """Fuzzes one format; the first byte of an input chooses the file."""
  valid, folder, seeds = root / 'valid', root / 'work', root / 'seeds'
  for path in (valid, seeds):
    path.mkdir(parents=True)
  corpus = corpora.CORPORA[kind]
  corpus.write(valid)
  shutil.copytree(valid, folder)
  files = corpus.files(valid)
  for i, file in enumerate(files):
    (seeds / str(i)).write_bytes(bytes([i]) + file.read_bytes())
  largest = max(file.stat().st_size for file in files)

  def read(data: bytes):
    file = files[data[0] % len(files) if data else 0]
    target = folder / file.relative_to(valid)
    target.write_bytes(data[1:])
    try:
      corpus.read(folder)
    except Exception as e:
      if not worker.is_ours(e, folder):
        raise
    finally:
      target.write_bytes(file.read_bytes())

  read(b'')  # warms up imports and caches
  atheris.Setup(
    [
      'guided',
      f'-runs={runs}',
      f'-seed={seed}',
      '-timeout=60',
      f'-max_len={2 * largest}',
      '-rss_limit_mb=4096',
      f'-artifact_prefix={root}/',
      str(seeds),
    ],
    read,
  )
  atheris.Fuzz()


if __name__ == '__main__':
  main(*sys.argv[1:4], Path(sys.argv[4]))
