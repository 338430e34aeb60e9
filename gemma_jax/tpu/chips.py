"""What a TPU chip can do, according to its maker.

Sources. Compute, HBM bandwidth and interconnect: the page of each version under
https://cloud.google.com/tpu/docs (v3, v4, v5e, v5p, v6e), read in 2026; the
links of v3: Norrie et al., "The Design Process for Google's Training Chips",
IEEE Micro 41 (2021). Those pages give the interconnect of both directions
together; the figure here is one direction, over all links of a chip. Network
between slices: the pages of v5e and v6e per pod, of v5p per chip; v4: its host's
200 Gbps over 4 chips. Memory: what the TPU compiler itself calls available
(libtpu 0.0.42), which is less than the chip has.
"""

import dataclasses

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Figures of one device as JAX counts them.

  A device is a chip, except on v3, where each of a chip's two cores is one.

  Attributes:
    name: version, as in `v5e:2x4`.
    devices_per_chip: 1, or 2.
    peak_flops: bfloat16 multiplications and additions per second.
    hbm_bytes: bytes that a program may use.
    hbm_bytes_per_sec: to and from HBM.
    ici_bytes_per_sec: sent by a device to others of its slice, over all links.
    dcn_bytes_per_sec: sent by a device to other slices; None if this version does
      not support several slices.
    dimensions: of a slice: 2 or 3.
  """

  name: str
  devices_per_chip: int
  peak_flops: float
  hbm_bytes: int
  hbm_bytes_per_sec: float
  ici_bytes_per_sec: float
  dcn_bytes_per_sec: float | None
  dimensions: int


CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      name='v3',
      devices_per_chip=2,
      peak_flops=123e12 / 2,
      hbm_bytes=int(15.48 * _GIB),
      hbm_bytes_per_sec=900e9 / 2,
      ici_bytes_per_sec=4 * 656e9 / 8 / 2,
      dcn_bytes_per_sec=None,
      dimensions=2,
    ),
    Chip(
      name='v4',
      devices_per_chip=1,
      peak_flops=275e12,
      hbm_bytes=int(30.75 * _GIB),
      hbm_bytes_per_sec=1200e9,
      ici_bytes_per_sec=2400e9 / 8,
      dcn_bytes_per_sec=200e9 / 8 / 4,
      dimensions=3,
    ),
    Chip(
      name='v5e',
      devices_per_chip=1,
      peak_flops=197e12,
      hbm_bytes=int(15.75 * _GIB),
      hbm_bytes_per_sec=819e9,
      ici_bytes_per_sec=400e9 / 2,
      dcn_bytes_per_sec=6.4e12 / 8 / 256,
      dimensions=2,
    ),
    Chip(
      name='v5p',
      devices_per_chip=1,
      peak_flops=459e12,
      hbm_bytes=int(95.74 * _GIB),
      hbm_bytes_per_sec=2765e9,
      ici_bytes_per_sec=1200e9 / 2,
      dcn_bytes_per_sec=50e9 / 8,
      dimensions=3,
    ),
    Chip(
      name='v6e',
      devices_per_chip=1,
      peak_flops=918e12,
      hbm_bytes=int(31.25 * _GIB),
      hbm_bytes_per_sec=1638e9,
      ici_bytes_per_sec=800e9 / 2,
      dcn_bytes_per_sec=25.6e12 / 8 / 256,
      dimensions=2,
    ),
  )
}
