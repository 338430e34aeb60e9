"""Checksums of a folder: any change of a file is found, and said."""

import json

from etils import epath
import pytest

from gemma_jax.runs import checksums


@pytest.fixture
def folder(tmp_path):
  """A step of three files, sealed."""
  folder = epath.Path(tmp_path) / '4'
  (folder / 'state' / 'd').mkdir(parents=True)
  (folder / 'state' / 'd' / 'a').write_bytes(bytes(range(251)))
  (folder / 'state' / 'manifest').write_bytes(b'm' * 7)
  (folder / 'empty').write_bytes(b'')
  checksums.seal(folder)
  return folder


def test_an_untouched_folder_has_no_defect(folder):
  assert checksums.defects(folder) == []


@pytest.mark.parametrize('bit', [0, 1003, 2007])
def test_one_flipped_bit_is_found(folder, bit):
  path = folder / 'state' / 'd' / 'a'
  content = bytearray(path.read_bytes())
  content[bit // 8] ^= 1 << bit % 8
  path.write_bytes(content)
  assert checksums.defects(folder) == ['state/d/a has other content']


def test_truncation_and_removal_are_found(folder):
  (folder / 'state' / 'd' / 'a').write_bytes(bytes(range(250)))
  (folder / 'empty').unlink()
  assert sorted(checksums.defects(folder)) == ['empty is missing', 'state/d/a has 250 bytes of 251']


@pytest.mark.parametrize('content', [b'', b'{', b'[]', b'{"a": 1}', b'{"a": [1]}', b'\xff\xfe'])
def test_damaged_checksums_are_a_defect(folder, content):
  (folder / checksums.CHECKSUMS).write_bytes(content)
  assert checksums.defects(folder) == ['checksums.json is damaged']


def test_missing_checksums_are_a_defect(folder):
  (folder / checksums.CHECKSUMS).unlink()
  assert checksums.defects(folder) == ['checksums.json is missing']


def test_sealing_again_adds_only_what_is_new(folder):
  """What was sealed before keeps its checksum, also if it changed since."""
  (folder / 'late').write_bytes(b'new')
  (folder / 'state' / 'manifest').write_bytes(b'x' * 7)
  checksums.seal(folder)
  assert checksums.defects(folder) == ['state/manifest has other content']
  assert 'late' in json.loads((folder / checksums.CHECKSUMS).read_text())


def test_skipped_files_have_no_checksum(tmp_path):
  folder = epath.Path(tmp_path)
  (folder / 'a').write_bytes(b'a')
  (folder / 'b').write_bytes(b'b')
  checksums.seal(folder, skip=('b',))
  (folder / 'b').write_bytes(b'c')
  assert checksums.defects(folder) == []


def make_steps(root, *numbers):
  for number in numbers:
    (root / str(number)).mkdir(parents=True)
    (root / str(number) / 'a').write_bytes(b'a')
    checksums.seal(root / str(number))


def break_step(root, number):
  (root / str(number) / 'a').write_bytes(b'b')


def unseal(root, number):
  (root / str(number) / checksums.CHECKSUMS).unlink()


def test_the_newest_good_step_is_found(tmp_path):
  root = epath.Path(tmp_path)
  make_steps(root, 2, 4, 10)
  (root / '12.orbax-checkpoint-tmp').mkdir()
  assert checksums.newest_good(root) == (10, {})
  break_step(root, 10)
  assert checksums.newest_good(root) == (4, {10: 'a has other content'})
  for step in (2, 4):
    break_step(root, step)
  assert checksums.newest_good(root)[0] is None


def test_a_step_without_checksums_yields_to_an_older_one_with(tmp_path):
  root = epath.Path(tmp_path)
  make_steps(root, 2, 4)
  unseal(root, 4)
  assert checksums.newest_good(root) == (2, {4: 'checksums.json is missing'})


def test_a_step_without_checksums_is_used_if_there_is_no_other(tmp_path):
  root = epath.Path(tmp_path)
  make_steps(root, 2, 4)
  for step in (2, 4):
    unseal(root, step)
  assert checksums.newest_good(root)[0] == 4
  assert set(checksums.newest_good(root)[1]) == {2, 4}


def test_no_folder_has_no_step(tmp_path):
  assert checksums.newest_good(epath.Path(tmp_path) / 'none') == (None, {})


def test_setting_aside_keeps_the_files_each_time(tmp_path):
  root = epath.Path(tmp_path)
  for _ in range(2):
    make_steps(root, 4)
    checksums.set_aside(root, 4)
  assert sorted(p.name for p in root.iterdir()) == ['4.set_aside', '4.set_aside2']
  assert (root / '4.set_aside2' / 'a').exists()
  assert checksums.steps(root) == []
