"""kor.txt: English and Korean sentences of the Tatoeba project.

Hi.	안녕.	CC-BY 2.0 (France) Attribution: tatoeba.org #538123 (CM) & ...
"""

from collections.abc import Iterator, Sequence

from gemma_jax.data.tfds.file_builder import FileBuilder, Row


class TatoebaEnKo(FileBuilder):
  """5,749 pairs of sentences, with the authors of each.

  Licence: CC BY 2.0 FR; the field `attribution` names the two sentences and
  their authors, and has to stay with them. The file is made by
  manythings.org/anki from tatoeba.org.
  """

  FIELDS = ('en', 'ko', 'attribution')
  FILE = 'kor.txt'
  HOMEPAGE = 'https://www.manythings.org/anki/'
  LICENSE = 'CC BY 2.0 FR'

  def parse(self, content: bytes) -> Iterator[Row]:
    lines = content.decode('utf-8-sig').split('\n')
    for number, line in enumerate(lines, 1):
      if not line.strip():
        continue
      fields = line.rstrip('\r').split('\t')
      if len(fields) != 3:
        raise ValueError(
          f'tfds:{self.name}: line {number}: got {len(fields)} fields '
          'between tabs, expected 3: English, Korean, attribution.'
        )
      yield dict(zip(self.FIELDS, fields, strict=True))

  def prompts(self, rows: Sequence[Row]) -> list[str]:
    """Pairs that share a sentence, directly or through others, are one group.

        Hi. 안녕.    Hello. 안녕.    Hello. 여보세요.      all in one split

    Either sentence may be the prompt, so neither may be in two splits. A group is
    named by its first sentence in alphabetical order.
    """
    parents: dict[str, str] = {}

    def root(node: str) -> str:
      while parents.setdefault(node, node) != node:
        parents[node] = parents[parents[node]]
        node = parents[node]
      return node

    for row in rows:
      a, b = root('en ' + row['en']), root('ko ' + row['ko'])
      parents[max(a, b)] = min(a, b)
    return [root('en ' + row['en']) for row in rows]
