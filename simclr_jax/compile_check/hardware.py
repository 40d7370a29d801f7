"""TPUs: their names, the shapes of their slices, and the published peaks of their chips.

Imports no JAX, so that `ENVIRONMENT` can be set before it is imported.
"""

import dataclasses
import math
import re

from simclr_jax.compile_check import gpus
from simclr_jax.errors import ConfigError

# libtpu on a machine without a TPU: it must not query the metadata server, may be loaded by several processes
# (which would be wrong with real chips), and must not log that there is no TPU.
ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': 'true',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_STDERR_LOG_LEVEL': '3',
  'TPU_MIN_LOG_LEVEL': '3',
}


@dataclasses.dataclass(frozen=True)
class Chip:
  """A kind of TPU chip. Values are per chip, except `hbm`, which is per JAX device.

  Attributes:
    cores: cores per chip where gcloud's names count cores (v3-128: 64 chips), else 1.
    devices: JAX devices.
    flops: bfloat16 FLOP/s.
    hbm: bytes of memory that a program may use, from the error messages of the TPU compiler.
    hbm_bandwidth: bytes/s.
    ici_bandwidth: bytes/s to the other chips of a slice, over all links of the interconnect, in one direction.
    dcn_bandwidth: bytes/s to other slices, over the data centre network; None where it is not published.
    options: for the description of a topology.
  """

  cores: int
  devices: int
  flops: float
  hbm: float
  hbm_bandwidth: float
  ici_bandwidth: float
  dcn_bandwidth: float | None = None
  options: tuple[tuple[str, str], ...] = ()


GIB = 2**30
# Sources: docs.cloud.google.com/tpu/docs/v2, v3, v4, v5e, v5p, v6e, tpu7x: peak compute, HBM bandwidth,
# bidirectional ICI bandwidth (halved here), data centre network. v2 and v3 publish no ICI bandwidth there:
# 4 links of 496 and 656 Gbit/s, Jouppi et al. 2020, "A domain-specific supercomputer for training deep
# neural networks", table 3. v4: 6 links of 50 GB/s, Jouppi et al. 2023, "TPU v4: an optically
# reconfigurable supercomputer", table 4.
CHIPS = {
  'v2': Chip(2, 2, 45e12, 7.48 * GIB, 700e9, 248e9),
  'v3': Chip(2, 2, 123e12, 15.48 * GIB, 900e9, 328e9),
  'v4': Chip(2, 1, 275e12, 30.75 * GIB, 1200e9, 300e9, options=(('chip_config_name', 'megacore'),)),
  'v5e': Chip(1, 1, 197e12, 15.75 * GIB, 819e9, 200e9, 25e9 / 8),
  'v5p': Chip(2, 1, 459e12, 95.74 * GIB, 2765e9, 600e9, 50e9 / 8),
  'v6e': Chip(1, 1, 918e12, 31.25 * GIB, 1638e9, 400e9, 100e9 / 8),
  'tpu7x': Chip(2, 2, 2307e12, 94.75 * GIB, 7380e9, 600e9, 100e9 / 8),
}
ALIASES = {'v5litepod': 'v5e', 'v5': 'v5p', 'v7x': 'tpu7x'}

# Shapes of the slices that are sold, by their number of chips.
_FLAT = {2**i: (2 ** (i // 2), 2 ** (i - i // 2)) for i in range(11)}
_CUBIC = {2**i: tuple(sorted(2 ** ((i + k) // 3) for k in range(3))) for i in range(2, 13)}
_CUBIC |= {4: (2, 2, 1)}
SHAPES = {
  'v2': {n: _FLAT[n] for n in (4, 16, 64, 128, 256)},
  'v3': {n: _FLAT[n] for n in (4, 16, 32, 64, 128, 256, 512, 1024)},
  'v4': {n: shape for n, shape in _CUBIC.items() if n <= 2048},
  'v5e': {n: _FLAT[n] for n in (1, 4, 8, 16, 32, 64, 128, 256)},
  'v5p': {n: shape for n, shape in _CUBIC.items() if n <= 4096},
  'v6e': {n: _FLAT[n] for n in (1, 4, 8, 16, 32, 64, 128, 256)},
  'tpu7x': {n: shape for n, shape in _CUBIC.items() if n <= 4096},
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """One or several equal TPU slices.

  Attributes:
    text: the user's name for it.
    generation: a key of `CHIPS`.
    shape: chips along each axis of a slice.
    slices: number of slices.
  """

  text: str
  generation: str
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def chip(self) -> Chip:
    """The kind of its chips."""
    return CHIPS[self.generation]

  @property
  def devices(self) -> int:
    """Number of JAX devices in all slices."""
    return math.prod(self.shape) * self.chip.devices * self.slices

  @property
  def name(self) -> str:
    """libtpu's name of a slice, such as v3:8x8."""
    return f'{self.generation}:{"x".join(map(str, self.shape))}'

  @property
  def options(self) -> dict[str, object]:
    """libtpu's other options."""
    options: dict[str, object] = dict(self.chip.options)
    if self.generation in ('v5e', 'v6e'):  # machines with 1, 4 or 8 chips
      bounds = {1: (1, 1, 1), 8: (2, 4, 1)}.get(math.prod(self.shape))
      if bounds:
        options['chips_per_host_bounds'] = bounds
    if self.slices > 1:
      options['num_slices'] = self.slices
    return options


def topology(text: str, slices: int = 1) -> Topology | gpus.Gpus:
  """Parses a name such as 'v3-128' (gcloud's), 'v5e:4x4' (chips along the axes), '2x v5e-16', 'h100' or 'h100x8'.

  gcloud counts cores for v2, v3, v4, v5p and tpu7x, and chips for v5e and v6e.

  Raises:
    ConfigError: there is no such TPU or GPU.
  """
  if described := gpus.topology(text):
    if slices > 1:
      raise ConfigError(f'--slices={slices} is for TPUs: --topology={text!r} is one machine')
    return described
  match = re.fullmatch(
    r'(?:(\d+) ?x ?)?([a-z]+[0-9][0-9a-z]*)(?:-(\d+)|:(\d+(?:x\d+){1,2}))', text.strip()
  )
  generations = ', '.join(CHIPS)
  if not match:
    raise ConfigError(
      f"--topology={text!r} is no TPU: use gcloud's name such as v3-128 or v5e-256, or chips along the "
      f'axes such as v5e:4x4; generations: {generations}; GPUs: {", ".join(gpus.CARDS)}'
    )
  count, generation, number, axes = match.groups()
  generation = ALIASES.get(generation, generation)
  if generation not in CHIPS:
    raise ConfigError(f'--topology={text!r}: there is no TPU {generation}, only {generations}')
  if count and slices > 1:
    raise ConfigError(
      f'--topology={text!r} and --slices={slices} both set the number of slices: remove one of them'
    )
  slices = int(count) if count else slices
  if not 1 <= slices <= 256:
    raise ConfigError(f'the number of slices, {slices}, is not from 1 to 256')
  if slices > 1 and generation in ('v2', 'v3'):
    raise ConfigError(f'--topology={text!r}: multi-slice topologies need v4 or newer')
  if axes:
    shape = tuple(map(int, axes.split('x')))
    dimensions = len(next(iter(SHAPES[generation].values())))
    if len(shape) != dimensions or not all(shape):
      raise ConfigError(
        f'--topology={text!r}: chips of {generation} are connected in {dimensions} dimensions, '
        f'such as {generation}:{"x".join("4" * dimensions)}'
      )
    return Topology(text, generation, shape, slices)
  cores = CHIPS[generation].cores
  sold = {n * cores: shape for n, shape in SHAPES[generation].items()}
  if int(number) not in sold:
    raise ConfigError(
      f'--topology={text!r}: {generation} comes as {", ".join(f"{generation}-{n}" for n in sold)} '
      f'({"cores" if cores > 1 else "chips"}); name any other shape by its axes, '
      f'such as {generation}:{"x".join(map(str, sold[max(sold)]))}'
    )
  return Topology(text, generation, sold[int(number)], slices)
