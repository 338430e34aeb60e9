"""The first lines of a log name what decides the result."""

from gemma_jax.runs import describe
from gemma_jax.runs import prepare as run_lib
from tests import run_toy


def test_names_base_adapter_optimizer_data_and_steps(tmp_path):
  config = run_toy.config(run_toy.write_records(tmp_path))
  config.lora.ranks = {'layer_1/.*': 2}
  run = run_lib.prepare(config.resolve())
  lines = describe.describe(run).splitlines()
  assert lines[0] == 'base: random:tiny3, float32 weights, float32 activations'
  assert lines[1] == ('adapter: LoRA, rank 3 on q k v o gate up down, scale 5.33333, dropout 0.1')
  assert lines[2] == 'adapter: rank 2 at layer_1/.*'
  assert 'AdamW, learning rate 0.01 constant' in lines[3]
  assert lines[5].startswith('training: 19 records')
  assert lines[6].startswith('held-out: 1 records')
  assert lines[-1].startswith('7 steps of 2 rows x 96 positions')
