"""Collectives counted from the text of real programs, and from its dialects."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
import numpy as np
import pytest

from gemma_jax.tpu import hlo

MESH = jax.make_mesh((2, 4), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
TURNS = 7


def compile_text(per_device):
  """per_device(x [4, 12]) -> [4, 12], on each of 8 devices."""
  spec = PartitionSpec(('a', 'b'))
  f = jax.shard_map(per_device, mesh=MESH, in_specs=spec, out_specs=spec, check_vma=False)
  return jax.jit(f).lower(jnp.zeros((32, 12))).compile().as_text()


def scanned(body):
  """The text of a scan of `TURNS` turns over body(x) -> x."""

  def per_device(x):
    return jax.lax.scan(lambda x, _: (body(x), None), x, length=TURNS)[0]

  return compile_text(per_device)


def one(text):
  (found,) = hlo.collectives(text, 8)
  return found


A_GROUPS = [[0, 4], [1, 5], [2, 6], [3, 7]]
B_GROUPS = [[0, 1, 2, 3], [4, 5, 6, 7]]
X_BYTES = 4 * 12 * 4


@pytest.mark.parametrize(
  ('kind', 'body', 'result_bytes', 'groups', 'sent'),
  [
    (
      'all-gather',  # three other pieces are passed on, one each
      lambda x: jnp.sin(jax.lax.all_gather(x, 'b')).sum(0),
      4 * X_BYTES,
      B_GROUPS,
      3 * X_BYTES,
    ),
    (
      'all-reduce',  # halves are summed, then gathered
      lambda x: jnp.sin(jax.lax.psum(x, 'a')),
      X_BYTES,
      A_GROUPS,
      X_BYTES,
    ),
    (
      'all-reduce',
      lambda x: jnp.sin(jax.lax.psum(x, ('a', 'b'))),
      X_BYTES,
      [list(range(8))],
      2 * 7 / 8 * X_BYTES,
    ),
    (
      'reduce-scatter',
      lambda x: jnp.tile(jax.lax.psum_scatter(x, 'b', tiled=True), (4, 1)),
      X_BYTES / 4,
      B_GROUPS,
      3 / 4 * X_BYTES,
    ),
    (
      'all-to-all',
      lambda x: jnp.sin(jax.lax.all_to_all(x, 'b', 0, 0, tiled=True)),
      X_BYTES,
      B_GROUPS,
      3 / 4 * X_BYTES,
    ),
    (
      'collective-permute',
      lambda x: jnp.sin(jax.lax.ppermute(x, 'a', [(0, 1), (1, 0)])),
      X_BYTES,
      None,
      X_BYTES,
    ),
  ],
)
def test_kind_bytes_groups_and_turns(kind, body, result_bytes, groups, sent):
  found = one(scanned(body))
  assert found.kind == kind
  assert found.count == TURNS
  assert found.result_bytes == result_bytes
  assert found.sent_bytes == pytest.approx(TURNS * sent)
  if groups is not None:
    assert sorted(found.groups.tolist()) == groups


def test_loops_multiply():
  def body(x):
    return jax.lax.scan(lambda x, _: (jnp.sin(jax.lax.psum(x, 'a')), None), x, length=3)[0]

  assert one(scanned(body)).count == 3 * TURNS


def test_a_loop_whose_turns_hang_on_data_counts_once():
  def per_device(x):
    turns = jnp.int32(jnp.abs(x[0, 0])) + 2
    body = lambda _, x: jnp.sin(jax.lax.psum(x, 'a'))
    return jax.lax.fori_loop(0, turns, body, x)

  assert one(compile_text(per_device)).count == 1


def test_of_a_conditional_the_costlier_branch_counts():
  def per_device(x):
    return jax.lax.cond(
      x[0, 0] > 0,
      lambda x: jnp.sin(jax.lax.psum(x, 'a')),
      lambda x: jax.lax.psum(x[:1], 'b') + x,
      x,
    )

  found = one(compile_text(per_device))
  assert (found.result_bytes, found.groups.shape) == (X_BYTES, (4, 2))


def test_groups_that_cross_slices():
  along_a = one(scanned(lambda x: jnp.sin(jax.lax.psum(x, 'a'))))
  along_b = one(scanned(lambda x: jnp.sin(jax.lax.psum(x, 'b'))))
  slices = [0, 0, 0, 0, 1, 1, 1, 1]  # one for each index of a
  assert along_a.crosses(slices)
  assert not along_b.crosses(slices)
  assert not along_a.crosses([0] * 8)


@pytest.mark.parametrize(
  ('attributes', 'groups'),
  [
    ('replica_groups={{0,2},{1,3}}, x={}', [[0, 2], [1, 3]]),
    ('source_target_pairs={{0,1},{1,0}}', [[0, 1], [1, 0]]),
    ('replica_groups=[2,2]<=[4], x', [[0, 1], [2, 3]]),
    ('replica_groups=[2,2]<=[2,2]T(1,0), x', [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ('replica_groups={}, x', [[0, 1, 2, 3]]),
    ('dimensions={0}', [[0, 1, 2, 3]]),
  ],
)
def test_dialects_of_groups(attributes, groups):
  assert hlo.replica_groups(attributes, 4).tolist() == groups


# As the TPU compiler writes: a collective spread over fusions, loops that are
# not annotated, starts and dones.
TPU_TEXT = """
HloModule jit_step, is_scheduled=true

%fused.1 (p: bf16[17]) -> bf16[34] {
  ROOT %g.1 = bf16[34]{0:T(256)(128)(2,1)S(1)} all-gather(%p), channel_id=7, replica_groups=mesh['x'=2] {'x'}, dimensions={0}
}

%fused.2 (p: bf16[17]) -> bf16[34] {
  ROOT %g.2 = bf16[34]{0:T(256)(128)(2,1)S(1)} all-gather(%p), channel_id=7, replica_groups=mesh['x'=2] {'x'}, dimensions={0}
}

%body (p: (s32[], bf16[17])) -> (s32[], bf16[17]) {
  %f.1 = bf16[34]{0} fusion(%x), kind=kOutput, calls=%fused.1
  %f.2 = bf16[34]{0} fusion(%f.1), kind=kOutput, calls=%fused.2
  %s = (bf16[5,3]{1,0}, bf16[5,3]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%f.2), channel_id=8, source_target_pairs={{0,1},{1,0}}
  ROOT %d = bf16[5,3]{1,0} collective-permute-done(%s)
}

%condition (p: (s32[], bf16[17])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(18)
  ROOT %compare.2 = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

ENTRY %main (p: bf16[17]) -> bf16[17] {
  %w = (s32[]{:T(128)}, /*index=1*/bf16[17]{0}) while(%t), condition=%condition, body=%body
}
"""  # noqa: E501


def test_the_dialect_of_the_tpu_compiler():
  gather, permute = hlo.collectives(TPU_TEXT, 2)
  assert (gather.kind, gather.count, gather.result_bytes) == ('all-gather', 18, 68)
  assert (permute.kind, permute.count, permute.result_bytes) == ('collective-permute', 18, 30)


# A sum over two slices of two devices: scattered within each, sent to the
# other, gathered again, all under one channel.
SLICES_TEXT = """
ENTRY %main (p: f32[6,4]) -> f32[6,4] {
  %r = f32[3,4]{1,0} reduce-scatter(%p), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
  %s = (f32[3,4]{1,0}, u32[], token[]) send(%r, %after), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %v = (f32[3,4]{1,0}, u32[], token[]) recv(%after), channel_id=1, is_host_transfer=true
  ROOT %g = f32[6,4]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
}
"""  # noqa: E501


def test_what_goes_between_slices_is_a_send():
  found = hlo.collectives(SLICES_TEXT, 4)
  assert [(c.kind, c.sent_bytes) for c in found] == [
    ('reduce-scatter', 48),
    ('send', 48),
    ('all-gather', 48),
  ]
  assert [c.crosses([0, 0, 1, 1]) for c in found] == [False, True, False]


def test_arrays_lists_every_shape():
  text = scanned(functools.partial(jax.lax.psum, axis_name='a'))
  assert {(4, 12), ()} <= hlo.arrays(text)
  assert (32, 12) not in hlo.arrays(text)
  assert np.all([len(shape) < 3 for shape in hlo.arrays(text)])
