"""A dry run shows what a run would do, and leaves nothing behind."""

import pytest

from gemma_jax.runs import dry_run, train
from tests import data_toy, run_toy


@pytest.fixture(scope='module')
def records(tmp_path_factory):
  return run_toy.write_records(tmp_path_factory.mktemp('records'))


def test_shows_parameters_memory_and_the_first_batch(records, tmp_path):
  workdir = tmp_path / 'run'
  text = dry_run.dry_run(run_toy.config(records).resolve(), str(workdir))
  assert 'lora/layers/mlp/gate/lora_a' in text
  assert 'adapter: LoRA, rank 3 on q k v o gate up down, scale 5.33' in text
  assert 'training: 19 records' in text
  assert '7 steps of 2 rows x 96 positions' in text
  assert 'the run would start at step 0' in text
  assert 'temporaries (activations, gradients)' in text
  assert '⟨bos⟩Instruction:\nWhere is' in text
  assert 'Response:\n[[Past the ' in text
  assert '.⟨eos⟩]]' in text
  assert not workdir.exists()


def test_reads_the_checkpoint_that_is_there(records, tmp_path):
  config = run_toy.config(records).resolve()
  asked = iter(range(6))
  with pytest.raises(train.Stopped):
    train.train(config, str(tmp_path), lambda: next(asked, None) is None)
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*') if p.is_file()}
  text = dry_run.dry_run(config, str(tmp_path))
  after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*') if p.is_file()}
  assert 'the run would resume at step' in text
  assert after == before


def test_refuses_what_the_run_would_refuse(records, tmp_path):
  config = run_toy.config(records)
  config.data.seq_len = 5000
  with pytest.raises(ValueError, match=r'data\.seq_len: got 5000'):
    dry_run.dry_run(config.resolve(), str(tmp_path))


def test_control_tokens_cannot_be_taken_for_text(tmp_path):
  """A chat shows its turns; what a text spells stays what it spells."""
  rows = [{'prompt': f'<start_of_turn>or⟨bos⟩{i}?', 'response': 'Hi', 'id': i} for i in range(30)]
  path = data_toy.write_jsonl(tmp_path / 'records.jsonl', rows)
  tokenizer = tmp_path / 'tokenizer.model'
  toy = data_toy.make_tokenizer(runs=(), words=())
  tokenizer.write_bytes(toy.model_proto)
  config = run_toy.config(path)
  config.model.tokenizer = str(tokenizer)
  config.data.template = 'chat'
  text = dry_run.dry_run(config.resolve(), str(tmp_path / 'run'))
  shown = (
    '⟨bos⟩⟨start_of_turn⟩user\n<start_of_turn>or\\u27e8bos\\u27e9{}?'
    '⟨end_of_turn⟩\n⟨start_of_turn⟩model\n[[Hi⟨end_of_turn⟩⟨eos⟩]]'
  )
  assert any(shown.format(i) in text for i in range(30))
  assert 'unread fields: id × 30' in text
  config.data.parse_control_tokens = True
  text = dry_run.dry_run(config.resolve(), str(tmp_path / 'run'))
  shown = '⟨start_of_turn⟩user\n⟨start_of_turn⟩or\\u27e8bos\\u27e9'
  assert shown in text


def test_targets_cannot_be_taken_for_brackets_of_a_text(tmp_path):
  rows = [
    {'prompt': f'a[[{i}]] b[0] \\n \\u005b [', 'response': '[x] = [[1], [2]] ]'} for i in range(9)
  ]
  path = data_toy.write_jsonl(tmp_path / 'records.jsonl', rows)
  config = run_toy.config(path)
  config.data.template = 'plain'
  text = dry_run.dry_run(config.resolve(), str(tmp_path / 'run'))
  asked = r'a\u005b\u005b{}\u005d\u005d b[0] \n \u005cu005b \u005b'
  answered = r'[[\u005bx] = \u005b\u005b1], [2\u005d\u005d \u005d⟨eos⟩]]'
  assert any(f'⟨bos⟩{asked.format(i)}{answered}' in text for i in range(9))


def test_says_what_would_become_of_a_finished_run(tmp_path):
  records = run_toy.write_records(tmp_path)
  config = run_toy.config(records, steps=2, eval_every_steps=0)
  train.train(config.resolve(), str(tmp_path / 'run'))
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
  say = lambda: dry_run.dry_run(config.resolve(), str(tmp_path / 'run'))
  assert 'the run has finished' in say()
  config.steps = 3
  assert 'the run would resume at step 2' in say()
  config.optimizer.learning_rate = 0.5
  with pytest.raises(ValueError, match=r'was made with optimizer\.learning'):
    say()
  assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')} == before
