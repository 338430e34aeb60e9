"""Model cards say what is known, and nothing that is not."""

import ast
from pathlib import Path
import re

import pytest
import yaml

from gemma_jax.config.train import LoraConfig
from gemma_jax.formats import model_card
from gemma_jax.formats.trained_with import TrainedWith

ROOT = Path(__file__).parents[2]
CONFIG = LoraConfig(rank=4, alpha=6.0, targets='q|down')


def card(folder, reference='gemma3_270m', trained_with=None, **kwargs):
  """(front matter, text) of a card."""
  model_card.write(folder, reference, CONFIG, trained_with, **kwargs)
  _, header, text = (folder / 'README.md').read_text('utf-8').split('---\n', 2)
  return yaml.safe_load(header), text


def test_card_of_an_adapter(tmp_path):
  header, text = card(tmp_path, trained_with=TrainedWith('korean', 'all'), results=['7 records'])
  assert header['base_model'] == 'google/gemma-3-270m'
  assert header['library_name'] == 'peft'
  assert '\n- rank 4, scale 1.5, on q, down\n' in text
  assert '\n- template `korean`, loss on: all\n- 7 records\n' in text
  assert '\n```\n질문:\nQUESTION\n\n답변:\n\n```\n' in text
  assert "--model=gemma3_270m --adapter=FOLDER --prompt='QUESTION'" in text
  assert 'licence of the base' in text and text.endswith('```\n')


def test_what_is_not_known_is_left_out(tmp_path):
  header, text = card(tmp_path, '/home/me/secret/gemma-2b/')
  assert 'base_model' not in header and 'template' not in text and 'continue' not in text
  assert '\n- base: `gemma-2b`\n' in text and 'secret' not in text
  assert '--model=PATH --to=hf' in text
  assert '\n- base: `unknown`\n' in card(tmp_path, '')[1]


@pytest.mark.parametrize(
  'merged_to, library, blocks',
  [('', 'peft', 3), ('hf', 'transformers', 2), ('flax', None, 1)],
)
def test_each_form_is_loaded_by_what_reads_it(tmp_path, merged_to, library, blocks):
  """Python that parses; commands and flags that exist."""
  header, text = card(tmp_path, 'hf:google/gemma-2b@main', merged_to=merged_to)
  assert header['base_model'] == 'google/gemma-2b'
  assert header.get('library_name') == library
  written = re.findall(r'```(\w+)\n(.*?)```', text, re.DOTALL)
  assert len(written) == blocks
  for language, code in written:
    if language == 'python':
      ast.parse(code)
      continue
    (command,) = re.findall(r'^python -m launch\.(\w+) ', code)
    source = (ROOT / 'launch' / f'{command}.py').read_text('utf-8')
    for flag in re.findall(r' --(\w+)=', code):
      assert re.search(rf"DEFINE_\w+\(\s*'{flag}'", source), flag
