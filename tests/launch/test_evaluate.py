"""launch.evaluate as a user calls it: what it measures with, and says so."""

import json
from pathlib import Path
import subprocess
import sys

from gemma_jax.config.train import LoraConfig
from gemma_jax.export import convert
from gemma_jax.formats import peft
from gemma_jax.formats.trained_with import TrainedWith
from gemma_jax.model import variants
from tests import data_toy, toy

MODEL = 'random:tiny3'


def test_a_merged_model_is_measured_as_its_adapter_was_trained(tmp_path):
  config = LoraConfig(rank=2)
  factors = toy.factors(variants.get('tiny3'), config)
  peft.write_adapter(
    tmp_path / 'a', factors, config, MODEL, trained_with=TrainedWith('korean', 'all')
  )
  convert.convert(MODEL, str(tmp_path / 'm'), 'hf', str(tmp_path / 'a'), verify=False)
  # The toy has no tokenizer.model, so records are tokens.
  data = data_toy.write_jsonl(tmp_path / 'data.jsonl', [{'tokens': [2, 5, 7, 9]}] * 4)
  done = subprocess.run(
    [sys.executable, '-m', 'launch.evaluate', f'--model={tmp_path / "m"}', f'--data={data}'],
    cwd=Path(__file__).parents[2],
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  line = json.loads(done.stdout)
  assert line['adapter'] == 'base'
  assert (line['template'], line['loss_on']) == ('korean', 'all')
  used = 'Measured with template=korean, loss_on=all, parse_control_tokens=False'
  assert used in done.stderr
