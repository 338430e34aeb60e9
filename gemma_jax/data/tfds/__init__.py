"""TFDS builders, one folder each, and reading what they prepared.

A builder turns one text file into array_record files with the splits train,
validation and test (90, 5 and 5 %, no prompt in two of them). TensorFlow is
not needed. Nothing is imported until a function is called.
"""

import contextlib
import importlib
import io
from typing import Any

from etils import epath

DATA_DIR = '~/.cache/gemma_jax/tfds'

# Package of this folder → its builder.
_BUILDERS = {'dolly': 'Dolly', 'korean_chatbot': 'KoreanChatbot', 'tatoeba_en_ko': 'TatoebaEnKo'}


def make_builder(name: str, path: str = '', data_dir: str = ''):
  """The `tfds.core.DatasetBuilder` of a name; nothing is read or written yet.

  Args:
    name: dolly, korean_chatbot or tatoeba_en_ko.
    path: a local copy of the file that the builder reads; '' downloads it, if it
      has a URL.
    data_dir: folder of prepared data sets; '' is ~/.cache/gemma_jax/tfds.

  Raises:
    ValueError: the name is unknown, or the local file is missing or not the one
      expected.
  """
  if name not in _BUILDERS:
    raise ValueError(
      f'data.path: got {f"tfds:{name}"!r}, expected one of '
      f'{", ".join(f"tfds:{known}" for known in _BUILDERS)}.'
    )
  module = importlib.import_module(f'{__name__}.{name}')
  folder = epath.Path(data_dir or DATA_DIR).expanduser()
  return getattr(module, _BUILDERS[name])(path=path, data_dir=folder)


def read_split(name: str, split: str, path: str = '', data_dir: str = '') -> list[dict[str, Any]]:
  """Records of one split, in the order of the file; prepares it at first use.

  Args:
    name: as in `make_builder`, like path and data_dir.
    split: train, validation or test.
    path: a local copy of the file.
    data_dir: folder of prepared data sets.

  Raises:
    ValueError: as in `make_builder`, or the download failed.
  """
  import tensorflow_datasets as tfds

  tfds.disable_progress_bar()  # it takes a second
  builder = make_builder(name, path, data_dir)
  try:
    # Standard output is for results; TFDS would announce itself there.
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare()
  except OSError:
    # Another process of this run may have been faster.
    builder = make_builder(name, path, data_dir)
    if not builder.is_prepared():
      raise
  source = builder.as_data_source(split=split)
  return [
    {key: value.decode() for key, value in example.items()}
    for example in source.__getitems__(range(len(source)))
  ]
