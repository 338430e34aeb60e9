"""ChatbotData.csv: Korean questions, answers, and the kind of conversation.

Q,A,label
12시 땡!,하루가 또 가네요.,0
"""

from collections.abc import Iterator
import csv
import io

from gemma_jax.data.tfds.file_builder import FileBuilder, Row


class KoreanChatbot(FileBuilder):
  """11,823 Korean pairs; category 0 is daily life, 1 parting, 2 love.

  Licence: MIT, Youngsook Song.
  """

  FIELDS = ('instruction', 'response', 'category')
  FILE = 'ChatbotData.csv'
  HOMEPAGE = 'https://github.com/songys/Chatbot_data'
  LICENSE = 'MIT'

  def parse(self, content: bytes) -> Iterator[Row]:
    text = io.StringIO(content.decode('utf-8-sig'), newline='')
    rows = csv.reader(text)
    header = next(rows, [])
    if header != ['Q', 'A', 'label']:
      raise ValueError(
        f"tfds:{self.name}: line 1: got {','.join(header)!r}, expected the header 'Q,A,label'."
      )
    for row in rows:
      if len(row) != 3:
        raise ValueError(
          f'tfds:{self.name}: line {rows.line_num}: got {len(row)} fields, expected 3: Q,A,label.'
        )
      yield dict(zip(self.FIELDS, row, strict=True))
