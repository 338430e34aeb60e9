"""Which changes a workdir accepts, and what it says of the others."""

import json
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
    'made_with': {},
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
  message = f'its {name} had the fingerprint .*, the {name} .* has zz.* Use'
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
  with pytest.raises(ValueError, match='which did not record the fingerprints'):
    resume.check('run', {'config': {}, 'steps': 7}, facts(), 4)


@pytest.mark.parametrize('name', ['adapter', 'adapter_best', ''])
def test_the_advice_says_how_to_go_on_from_what_was_learnt(tmp_path, name):
  if name:
    (tmp_path / name).mkdir()
    (tmp_path / name / 'adapter_config.json').touch()
  with pytest.raises(ValueError, match='Use another workdir') as e:
    resume.check(str(tmp_path), facts(), facts(seed=5), 4)
  setting = f'there lora.path={tmp_path}/{name} starts from what was learnt'
  assert (setting in str(e.value)) == bool(name)


def test_an_empty_workdir_accepts_everything(tmp_path):
  assert resume.finished(str(tmp_path), facts()) is None
  assert resume.newest(str(tmp_path), None, facts()) is None


@pytest.mark.parametrize('before', [{}, {'data': None}, {'data': 'other'}])
def test_what_is_not_known_to_be_the_same_is_refused(before):
  with pytest.raises(ValueError, match=r'its data .*Use another workdir'):
    resume.check_fingerprints('run', before, {'data': 'c'})
  with pytest.raises(ValueError, match='Put it back'):
    resume.check_fingerprints('run', before, {'data': 'c'}, 'Put it back.')


@pytest.mark.parametrize('value', [float('nan'), True, None])
def test_a_result_that_is_no_number_is_refused(tmp_path, value):
  result = {'steps': 7, 'loss_base': value, 'loss_adapted': 1.0, 'run': facts()}
  (tmp_path / 'result.json').write_text(json.dumps(result))
  with pytest.raises(ValueError, match=r'loss_base is .*expected a number'):
    resume.finished(str(tmp_path), facts())


def test_a_finished_run_without_its_adapter_goes_on(tmp_path):
  result = {'steps': 7, 'loss_base': 2.0, 'loss_adapted': 1.0, 'run': facts()}
  (tmp_path / 'result.json').write_text(json.dumps(result))
  assert resume.finished(str(tmp_path), facts()) is None
  (tmp_path / 'adapter').mkdir()
  (tmp_path / 'adapter' / 'adapter_config.json').write_text('{}')
  assert resume.finished(str(tmp_path), facts())['steps'] == 7


def test_fewer_skipped_batches_than_there_were_are_refused():
  class Checkpoints:
    """Of a run that has skipped two."""

    latest_step = staticmethod(lambda: 4)
    read_notes = staticmethod(lambda step: {**facts(), 'found': {'skipped': [1, 3]}})

  for allowed in (2, 5):
    resume.newest('run', Checkpoints, facts(max_skipped_batches=allowed))
  with pytest.raises(ValueError, match=r'max_skipped_batches: got 1, but .* skipped 2'):
    resume.newest('run', Checkpoints, facts(max_skipped_batches=1))
