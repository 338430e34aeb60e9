"""What the builders share: one checked text file, split by prompt."""

import abc
from collections.abc import Hashable, Iterator, Sequence
import hashlib
import http.client
from typing import Any
import urllib.request

from etils import epath
import tensorflow_datasets as tfds

Row = dict[str, str]

_TIMEOUT_SECS = 30


class FileBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Rows of text fields from one file, as train, validation and test.

  Subclasses say which fields, and how to parse the file. Data of a file whose
  hash is not fixed is kept under its hash, so that a different file of the same
  name is prepared anew.

  Attributes:
    FIELDS: names of the text features.
    FILE: name of the file, for messages.
    URL: where to download it; '' if a local path must be given.
    SHA256: of the file; '' accepts any.
    LICENSE: of the records.
    HOMEPAGE: of the data set.
  """

  VERSION = tfds.core.Version('1.0.0')
  FIELDS: tuple[str, ...]
  FILE: str
  URL = ''
  SHA256 = ''
  LICENSE: str
  HOMEPAGE: str

  # TFDS would look beside it for a list of checksums; the check is made here.
  code_path = None

  def __init__(self, *, path: str = '', **kwargs: Any):
    """Reads and checks the local file, if there is one.

    Args:
      path: local file; '' downloads it when the data is prepared.
      **kwargs: of `tfds.core.GeneratorBasedBuilder`, e.g. data_dir.

    Raises:
      ValueError: no such file, a different file, or neither a path nor a URL.
    """
    self._content = b''
    if path:
      file = epath.Path(path).expanduser()
      if not file.is_file():
        raise ValueError(
          f'tfds:{self.name}: got {path!r}, which is not a file; expected the '
          f'path of {self.FILE} ({self.HOMEPAGE}).'
        )
      self._content = file.read_bytes()
      digest = self._check(self._content, path)
      if not self.SHA256:
        kwargs['config'] = tfds.core.BuilderConfig(name=digest[:16], version=self.VERSION)
    elif not self.URL:
      raise ValueError(
        f'data.path: got tfds:{self.name} without a file, expected '
        f'tfds:{self.name}:PATH with the path of {self.FILE} '
        f'({self.HOMEPAGE}).'
      )
    super().__init__(file_format='array_record', **kwargs)

  @abc.abstractmethod
  def parse(self, content: bytes) -> Iterator[Row]:
    """Yields the rows of the file; ValueError with the line if one is bad."""

  def prompts(self, rows: Sequence[Row]) -> Sequence[Hashable]:
    """A key for each row; rows with equal keys go to the same split."""
    return [(row['instruction'], row.get('context', '')) for row in rows]

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict({field: tfds.features.Text() for field in self.FIELDS}),
      homepage=self.HOMEPAGE,
      license=self.LICENSE,
      disable_shuffling=True,  # keep the order of the file
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # without a network it takes minutes to give up
    rows = list(self.parse(self._content or self._download()))
    splits: dict[str, list[Row]] = {'train': [], 'validation': [], 'test': []}
    for row, prompt in zip(rows, self.prompts(rows), strict=True):
      splits[split_of(prompt)].append(row)
    for name, members in splits.items():
      if not members:
        raise ValueError(
          f'tfds:{self.name}: got {len(rows)} rows, none of which fell into '
          f'the split {name}; expected a few hundred. Convert it to a .jsonl file '
          'to use it unchanged.'
        )
    return {name: self._generate_examples(members) for name, members in splits.items()}

  def _generate_examples(self, rows: list[Row]):
    yield from enumerate(rows)

  def _download(self) -> bytes:
    try:
      with urllib.request.urlopen(self.URL, timeout=_TIMEOUT_SECS) as response:
        content = response.read()
    except (OSError, http.client.HTTPException) as e:
      raise ValueError(
        f'tfds:{self.name}: cannot download {self.URL} '
        f'({" ".join(str(e).split()) or type(e).__name__}). Get the file '
        f'elsewhere and name it: tfds:{self.name}:/path/{self.FILE}.'
      ) from None
    self._check(content, self.URL)
    return content

  def _check(self, content: bytes, origin: str) -> str:
    """The content's SHA-256; ValueError if it is not the one expected."""
    digest = hashlib.sha256(content).hexdigest()
    if self.SHA256 and digest != self.SHA256:
      raise ValueError(
        f'tfds:{self.name}: {origin} has sha256 {digest} ({len(content)} '
        f'bytes), expected {self.SHA256}, the published {self.FILE}. Use it '
        'as a .jsonl file if the change is yours.'
      )
    return digest


def split_of(prompt: Hashable) -> str:
  """train for 90 % of the prompts, validation and test for 5 % each."""
  digest = hashlib.sha256(repr(prompt).encode()).digest()
  bucket = int.from_bytes(digest[:8], 'big') % 20
  return {0: 'validation', 1: 'test'}.get(bucket, 'train')
