"""What is prepared before a weight is read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import pytree
from gemma_jax.data import dataset
from gemma_jax.runs import evaluate_adapters
from gemma_jax.runs import prepare as run_lib
from gemma_jax.runs.base import activation_dtype
from tests import data_toy, run_toy


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  records = run_toy.write_records(tmp_path_factory.mktemp('records'))
  return run_lib.prepare(run_toy.config(records).resolve())


def test_abstract_state_is_what_a_start_would_make(run):
  state, frozen = run.program.abstract
  assert not [n for n, _ in pytree.items(state.trainable) if 'params' in n]
  assert not [n for n, _ in pytree.items(frozen) if 'lora' in n]
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.trainable))
  moments = [n for n, _ in pytree.items(state.opt_state) if '/mu/' in n]
  assert len(moments) == len(jax.tree.leaves(state.trainable))


def test_steps_follow_epochs_unless_given(run, tmp_path):
  records = run.config.data.path
  given = run_lib.prepare(run_toy.config(records, steps=5).resolve())
  counted = run_lib.prepare(run_toy.config(records, steps=0, epochs=2.0).resolve())
  rows = counted.plan.rows_per_epoch(0) + counted.plan.rows_per_epoch(1)
  assert given.steps == 5
  assert counted.steps == -(-rows // 2)


def test_fingerprints_tell_data_and_base_apart(run, tmp_path):
  same = run_lib.prepare(run.config)
  assert same.fingerprints() == run.fingerprints()
  other = run_toy.config(run_toy.write_records(tmp_path, 23))
  other.model.path = 'random:tiny2'
  changed = run_lib.prepare(other.resolve()).fingerprints()
  assert changed['data'] != run.fingerprints()['data']
  assert changed['base'] != run.fingerprints()['base']
  assert changed['tokenizer'] == run.fingerprints()['tokenizer']


def test_tensor_shards_beyond_the_heads_are_refused(run):
  config = run_toy.config(run.config.data.path)
  config.mesh.tensor, config.mesh.fsdp = 8, 1
  with pytest.raises(ValueError, match=r'mesh\.tensor: got 8.*divisor'):
    run_lib.prepare(config.resolve()).check()


def test_rows_must_divide_over_the_mesh(run):
  config = run_toy.config(run.config.data.path)
  config.mesh.fsdp = 8
  with pytest.raises(ValueError, match='multiple of data x fsdp = 8'):
    run_lib.prepare(config.resolve())


def test_activation_dtype_follows_the_mesh(run):
  assert activation_dtype('auto', run.base.mesh) == np.float32
  assert activation_dtype('bfloat16', run.base.mesh) == jnp.bfloat16


def test_vocabulary_padding_is_known(run):
  assert run.base.num_pieces == 260
  assert run.base.config.vocab_size == 263


def test_rows_are_as_long_as_the_base_allows(run, monkeypatch, caplog):
  """Unless the user gave a length, which is refused where it is too long."""
  config = run_toy.config(run.given.data.path)
  config.data.seq_len = 0
  outline = run_lib.outline(config.resolve())
  assert outline.given.data.seq_len == outline.config.data.seq_len == 512
  assert not caplog.records[1:]  # beside that of the mesh
  monkeypatch.setattr(dataset, 'DEFAULT_SEQ_LEN', 1024)
  longer = run_lib.outline(config.resolve())
  batch = run_lib.abstract_batch(longer.program(steps=1), longer.config)
  assert batch['tokens'].shape == (2, 512)
  assert 'Rows have 512 positions' in caplog.text
  config.data.seq_len = 1024
  with pytest.raises(ValueError, match=r'data\.seq_len: got 1024.*at most 512'):
    run_lib.outline(config.resolve())


def test_ids_of_rows_that_are_no_tokens_are_refused(tmp_path):
  """260 tokens, 263 rows: a masked target would cost 2^30 nats."""
  path = tmp_path / 'tokens.jsonl'
  message = r'got token id 261, expected ids below 260'
  rows = [{'tokens': [2, 7 + i, 261, 1]} for i in range(40)]
  data_toy.write_jsonl(path, rows)
  with pytest.raises(ValueError, match=message):
    run_lib.prepare(run_toy.config(str(path)).resolve())
  with pytest.raises(ValueError, match=message):
    next(evaluate_adapters.evaluate_adapters(run_toy.config(str(path)).resolve(), ['base']))
