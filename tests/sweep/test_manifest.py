"""What a sweep keeps of its held-out records, whatever their form."""

from gemma_jax.sweep import manifest
from tests import data_toy, run_toy, sweep_toy

FORMS = (
  lambda i: {'instruction': f'Q{i}', 'context': 'C', 'response': 'A'},
  lambda i: {
    'messages': [
      {'role': 'user', 'content': f'Q{i}'},
      {'role': 'assistant', 'content': 'A'},
      {'role': 'user', 'content': 'And?'},
      {'role': 'assistant', 'content': 'B'},
    ]
  },
  lambda i: {'tokens': [2, 4 + 81, 4 + 48 + i, 70, 1], 'loss_mask': [0, 0, 0, 1, 1], 'category': 7},
)


def drafted(folder, form, **fields):
  """Lines of heldout.jsonl of records of one form."""
  rows = [form(i) for i in range(10)]
  path = data_toy.write_jsonl(folder / 'records.jsonl', rows)
  data_toy.write_jsonl(folder / 'heldout.jsonl', rows)
  config = sweep_toy.config(path)
  run_toy.set_fields(config, fields)
  return manifest.draft(config.resolve()).heldout


def test_every_form_has_a_prompt(tmp_path):
  single, tokens = (drafted(tmp_path, FORMS[i]) for i in (0, 2))
  assert [row['prompt'] for row in single] == [f'Q{i}' for i in range(10)]
  assert {row['context'] for row in single} == {'C'}
  assert [row['prompt'] for row in tokens] == [f'Q{i}' for i in range(10)]
  assert {row['category'] for row in tokens} == {'7'}


def test_a_conversation_is_told_by_its_roles(tmp_path):
  tokenizer = tmp_path / 'tokenizer.model'
  toy = data_toy.make_tokenizer(runs=(), words=())
  tokenizer.write_bytes(toy.model_proto)
  fields = {'model.tokenizer': str(tokenizer), 'data.template': 'chat', 'data.seq_len': 200}
  heldout = drafted(tmp_path, FORMS[1], **fields)
  assert [row['prompt'] for row in heldout] == [
    f'user: Q{i}\n\nmodel: A\n\nuser: And?' for i in range(10)
  ]
