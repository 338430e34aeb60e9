"""databricks-dolly-15k: instructions and answers written by Databricks staff.

{"instruction": "When did Virgin Australia start operating?",
 "context": "Virgin Australia, the trading name of ...",
 "response": "Virgin Australia commenced services on 31 August 2000 ...",
 "category": "closed_qa"}
"""

from collections.abc import Iterator
import json

from gemma_jax.data.tfds.file_builder import FileBuilder, Row


class Dolly(FileBuilder):
  """15,011 instruction records of eight categories, by Databricks staff.

  4,467 have a context, taken from Wikipedia. 323 share (instruction, context)
  with another, hence the split by these two.

  Licence: CC BY-SA 3.0, Databricks, Inc., 2023.
  """

  FIELDS = ('instruction', 'context', 'response', 'category')
  FILE = 'databricks-dolly-15k.jsonl'
  HOMEPAGE = 'https://huggingface.co/datasets/databricks/databricks-dolly-15k'
  URL = f'{HOMEPAGE}/resolve/main/{FILE}'
  SHA256 = '2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec'
  LICENSE = 'CC BY-SA 3.0'

  def parse(self, content: bytes) -> Iterator[Row]:
    for line in content.splitlines():
      record = json.loads(line)
      yield {field: record[field] for field in self.FIELDS}
