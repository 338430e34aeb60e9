"""Slices by name; what libtpu makes of them."""

import sys

import pytest

from gemma_jax.tpu import chips, topology


@pytest.mark.parametrize(
  ('name', 'devices'),
  [
    ('v5e:1x1', 1),
    ('v5e:2x4', 8),
    ('2xv5e:4x4', 32),
    ('v4:2x2x1', 4),
    ('v5p:2x2x4', 16),
    ('v6e:2x4', 8),
    ('v3:2x2', 8),  # two devices a chip
  ],
)
def test_a_name_says_version_shape_and_slices(name, devices):
  found = topology.parse(name)
  assert found.num_devices == devices
  assert str(found) == name


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('v9:2x2', r"got 'v9:2x2', expected one of v3:2x2\|4x4.*v6e:1x1.*2xv5e"),
    ('v5e-8', 'expected one of'),
    ('v5e:8', 'expected one of'),
    ('', 'expected one of'),
    ('v5e:2x2x1', 'expected 2 sizes and at most 256 chips'),
    ('v4:2x2', 'expected 3 sizes'),
    ('v5e:32x32', 'at most 256 chips'),
    ('v5e:0x4', 'at most 256 chips'),
    ('2xv3:2x2', 'got 2 slices of v3, expected one'),
    ('0xv5e:2x2', 'got 0 slices'),
  ],
)
def test_unknown_names_are_refused(name, message):
  with pytest.raises(ValueError, match=message):
    topology.parse(name)


def test_without_libtpu_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'libtpu', None)
  with pytest.raises(ValueError, match=r"install -e '\.\[tpu\]'"):
    topology.parse('v5e:2x4').devices()


@pytest.mark.parametrize('chip', chips.CHIPS.values(), ids=chips.CHIPS)
def test_chips_are_plausible(chip):
  """A mistaken unit is off by 8 or more; the generations are not."""
  assert 5e13 < chip.peak_flops < 1e15
  assert 15 < chip.hbm_bytes / 2**30 < 96
  assert 100 < chip.peak_flops / chip.hbm_bytes_per_sec < 600
  assert 2 < chip.hbm_bytes_per_sec / chip.ici_bytes_per_sec < 6
  if chip.dcn_bytes_per_sec is not None:
    assert 30 < chip.ici_bytes_per_sec / chip.dcn_bytes_per_sec < 100


@pytest.mark.aot
@pytest.mark.parametrize(
  ('name', 'kind'),
  [
    ('v5e:1x1', 'TPU v5 lite'),
    ('v5e:4x4', 'TPU v5 lite'),
    ('2xv5e:2x4', 'TPU v5 lite'),
    ('v4:2x2x1', 'TPU v4'),
    ('v4:2x2x4', 'TPU v4'),
    ('v5p:2x2x2', 'TPU v5'),
    ('v6e:2x4', 'TPU v6 lite'),
    ('v3:2x2', 'TPU v3'),
  ],
)
def test_libtpu_has_the_devices(name, kind):
  wanted = topology.parse(name)
  devices = wanted.devices()
  assert len(devices) == wanted.num_devices
  assert devices[0].device_kind == kind
  slices = {getattr(d, 'slice_index', None) or 0 for d in devices}
  assert slices == set(range(wanted.num_slices))


@pytest.mark.aot
@pytest.mark.parametrize('name', topology.CLOUD_SHAPES)
def test_every_shape_that_messages_name_exists(name):
  for shape in topology.CLOUD_SHAPES[name]:
    assert topology.parse(f'{name}:{shape}').devices()
