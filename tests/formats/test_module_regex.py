"""Regexes of adapters: what `re` says of them, in bounded time."""

import re
import time

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from gemma_jax.formats import module_regex

NAMES = (
  'model.layers.0.self_attn.q_proj',
  'model.layers.17.mlp.down_proj',
  'model.language_model.layers.3.self_attn.o_proj',
  'model.vision_tower.vision_model.encoder.layers.3.self_attn.q_proj',
  'q_proj',
)

# As other tools write them, and what a person may write.
WRITTEN = (
  r'.*\.(q|v)_proj',
  r'(?i).*\.Q_PROJ',
  r'^(?!.*vision).*\b(?:q|v)_proj$',
  r'(?=.*layers)(?:\w+\.)*q_proj',
  r'model\.layers\.(?:1[0-9]|[0-9])\..*(?<!mlp\.down)_proj',
  r'(.*(?<=self_attn)\.\w_proj){1,3}?',
  r'(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)'
  r'.*?(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)'
  r'|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|down_proj)))',
)


@pytest.mark.parametrize('pattern', WRITTEN)
def test_what_people_write_matches_as_in_re(pattern):
  assert module_regex.is_regex(pattern)
  matcher = module_regex.Matcher()
  got = [matcher.matches(pattern, name) for name in NAMES]
  assert got == [re.fullmatch(pattern, name) is not None for name in NAMES]
  assert True in got


single = st.sampled_from(['a', 'b', '.', r'\.', '[ab]', '[^b]', r'\w', r'\b', '^', '$', ''])
times = st.sampled_from(['*', '+', '?', '*?', '{2}', '{1,2}', '{2,}?', '{0}'])
patterns = st.recursive(
  single,
  lambda inner: st.one_of(
    st.tuples(inner, inner).map(''.join),
    st.tuples(inner, inner).map(lambda x: f'(?:{x[0]}|{x[1]})'),
    st.tuples(inner, times).map(lambda x: f'({x[0]}){x[1]}'),
    st.tuples(st.sampled_from(['?=', '?!']), inner).map(lambda x: f'({x[0]}{x[1]})'),
    st.tuples(st.sampled_from(['?<=', '?<!']), single).map(lambda x: f'({x[0]}{x[1]})'),
  ),
  max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(patterns, st.text('ab.', max_size=6), st.integers(0, 2))
def test_any_regex_matches_as_in_re(pattern, name, start):
  start = min(start, len(name))
  assert module_regex.is_regex(pattern)
  want = re.compile(pattern).fullmatch(name, start) is not None
  assert module_regex.Matcher().matches(pattern, name, [start]) is want


@pytest.mark.parametrize(
  'pattern', [r'(\w+)+x', r'(a|[a-z_.0-9]+)+Q', '.*' * 99 + 'Q', '(a|a)' * 99]
)
def test_a_regex_of_many_ways_takes_no_longer(pattern):
  started = time.process_time()
  assert not module_regex.Matcher().matches(pattern, 'a' * 60)
  assert time.process_time() - started < 5


def test_the_work_for_all_names_is_bounded():
  matcher = module_regex.Matcher()
  started = time.process_time()
  with pytest.raises(ValueError, match=r"regex '\.\*\.\*.*' is too complex"):
    for _ in range(1_000_000):
      matcher.matches('.*' * 5000, 'a' * 60)
  assert time.process_time() - started < 60


@pytest.mark.parametrize(
  'pattern', [r'(a)\1', '(?>a)', 'a*+', '(?i:a)', '(a', 'a' * (1 + (1 << 14)), None, 3]
)
def test_what_is_not_matched_is_no_regex(pattern):
  assert not module_regex.is_regex(pattern)
