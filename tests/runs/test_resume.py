"""Which changes a workdir accepts, and what it says of the others."""

import re

import pytest

from gemma_jax.config import train as config_lib
from gemma_jax.runs import resume
from tests import run_toy

PRINTS = {'adapter': '', 'base': 'aa', 'tokenizer': 'b', 'data': 'c'}


def facts(steps=7, prints=(), **fields):
  config = run_toy.config('records.jsonl')
  run_toy.set_fields(config, fields)
  return {
    'config': config_lib.to_dict(config.resolve()),
    'steps': steps,
    'fingerprints': PRINTS | dict(prints),
  }


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('log_every_steps', 3),
    ('checkpoint_every_steps', 11),
    ('max_skipped_batches', 2),
    ('profile_steps', (2,)),
    ('mesh.data', 2),
    ('model.remat', 'full'),
    # The fingerprints are the same.
    ('data.path', 'elsewhere.jsonl'),
    ('data.eval_path', 'elsewhere.jsonl'),
    ('model.path', 'elsewhere'),
    ('model.tokenizer', 'elsewhere.model'),
    # As many steps.
    ('epochs', 3.5),
  ],
)
def test_fields_that_change_nothing_learnt_may_change(field, value):
  resume.check('run', facts(), facts(**{field: value}), 4)


def test_rows_of_the_default_length_are_rows_of_512():
  before, now = facts(**{'data.seq_len': 512}), facts(**{'data.seq_len': 0})
  resume.check('run', before, now, 4)
  resume.check('run', now, before, 4)


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('seed', 5),
    ('trainable', ('lora/layers/attn/q',)),
    ('optimizer.learning_rate', 0.5),
    ('optimizer.accumulate_steps', 2),
    ('data.seq_len', 64),
    ('data.max_records', 3),
    ('eval_every_steps', 2),
    ('early_stopping_evals', 1),
  ],
)
def test_other_fields_may_not(field, value):
  message = re.escape(f'was made with {field}=')
  with pytest.raises(ValueError, match=message):
    resume.check('run', facts(), facts(**{field: value}), 4)


@pytest.mark.parametrize('name', [*PRINTS])
def test_another_input_is_refused_with_both_values(name):
  message = f'its {name} had the fingerprint .*, the {name} .* has zz. Use'
  with pytest.raises(ValueError, match=message):
    resume.check('run', facts(), facts(prints={name: 'zz'}), 4)


@pytest.mark.parametrize('schedule', ['constant', 'linear', 'cosine'])
@pytest.mark.parametrize('steps', [5, 9])
def test_the_number_of_steps_may_change_with_a_constant_rate(schedule, steps):
  fields = {'optimizer.schedule': schedule}
  before, now = facts(**fields), facts(steps, **fields)
  if schedule == 'constant':
    resume.check('run', before, now, 5)
    return
  message = f"schedule='{schedule}' the rate of every step depends"
  with pytest.raises(ValueError, match=message):
    resume.check('run', before, now, 5)


def test_fewer_steps_than_done_are_refused():
  with pytest.raises(ValueError, match='got 3, but the run in run has done 4'):
    resume.check('run', facts(), facts(3), 4)


def test_a_field_that_an_earlier_version_did_not_have_has_its_default():
  before = facts()
  del before['config']['data']['packing']
  resume.check('run', before, facts(), 4)
  with pytest.raises(ValueError, match=r'data\.packing=True, this config has'):
    resume.check('run', before, facts(**{'data.packing': False}), 4)


def test_notes_that_say_nothing_are_refused():
  with pytest.raises(ValueError, match='does not say the fingerprints of its'):
    resume.check('run', {'config': {}, 'steps': 7}, facts(), 4)


@pytest.mark.parametrize('name', ['adapter', 'adapter_best', ''])
def test_the_advice_says_how_to_go_on_from_what_was_learnt(tmp_path, name):
  if name:
    (tmp_path / name).mkdir()
    (tmp_path / name / 'adapter_config.json').touch()
  with pytest.raises(ValueError, match='Use another workdir') as e:
    resume.check(str(tmp_path), facts(), facts(seed=5), 4)
  flag = f'--config.lora.path={tmp_path}/{name} starts from what was learnt'
  assert (flag in str(e.value)) == bool(name)


def test_an_empty_workdir_accepts_everything(tmp_path):
  assert resume.finished(str(tmp_path), facts()) is None
  assert resume.newest(str(tmp_path), None, facts()) is None
