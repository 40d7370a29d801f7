"""What a compiled step moves between devices, whether that is right, and what bounds its time."""

import collections
import dataclasses
import math

import jax
import ml_collections

from simclr_jax import health, methods
from simclr_jax.compile_check import hardware, hlo
from simclr_jax.compile_check.text import format_bytes
from simclr_jax.data import crop
from simclr_jax.models import network


def known(config: ml_collections.ConfigDict, state, devices: int) -> hlo.Known:
  """What the collectives of this recipe may move."""
  method, n, side = methods.build(config), config.batch_size, config.image_size
  d, m = network.output_size(config), method.views * config.batch_size
  shapes = {tuple(p.shape) for p in jax.tree.leaves(state.params)}
  shapes |= {  # and a device's part of each, where it is split
    (*p[:i], size // devices, *p[i + 1 :])
    for p in shapes
    for i, size in enumerate(p)
    if not size % devices and size > devices
  }
  bank = state.state.get('bank')
  classifier = state.params['classifier' if 'classifier' in state.params else 'probe']
  features = classifier['kernel'].shape[0]
  canvas = crop.canvas_shape(side, method.views, config.data.resize_on)
  return hlo.Known(
    embeddings=frozenset({(n, d), (m, d)}),
    similarities=frozenset({(a, b) for a in (n, m) for b in (n, m)}),
    parameters=frozenset(shapes),
    sides=((side, side), canvas),
    metrics=frozenset((min(n, health.IMAGES), v, w) for v in (1, 2) for w in {d, features}),
    shuffled=n * side * side * 3 if config.get('shuffle', 'none') != 'none' else 0,
    bank=frozenset(
      {(bank.shape[0] // devices, d), (config.negatives, d)} if bank is not None else ()
    ),
  )


@dataclasses.dataclass(frozen=True)
class Moved:
  """Equal collectives.

  Attributes:
    kind, devices: as in `hlo.Collective`.
    purposes: bytes by purpose.
    count: how many run in a step.
    traffic: bytes that a device sends for all of them, at least.
  """

  kind: str
  purposes: tuple[tuple[str, int], ...]
  devices: int
  count: int
  traffic: float

  @property
  def bytes(self) -> int:
    """Of one of them."""
    return sum(size for _, size in self.purposes)

  @property
  def text(self) -> str:
    """What it is for, the largest part first."""
    return ', '.join(name for name, _ in sorted(self.purposes, key=lambda p: -p[1]))


def moved(found: list[hlo.Collective], what: hlo.Known | None, devices: int) -> list[Moved]:
  """Collectives with their purposes, equal ones together, in the order of the program.

  Without `what`, all purposes are 'inside a slice'.
  """
  groups = collections.defaultdict(lambda: [0, 0.0])
  for c in found:
    sizes = collections.Counter()
    for array in c.arrays:
      scattered = c.devices if c.kind == 'reduce-scatter' else 1
      name = hlo.purpose(array, what, devices) if what else 'inside a slice'
      sizes[name] += scattered * array.bytes
    group = groups[c.kind, tuple(sorted(sizes.items())), c.devices]
    group[0] += c.times
    group[1] += c.traffic
  return [Moved(kind, sizes, n, *group) for (kind, sizes, n), group in groups.items()]


def problems(
  config: ml_collections.ConfigDict, state, found: list[Moved], devices: int
) -> list[str]:
  """What a recipe on several devices must not lose, and what it must not move: a sentence each."""
  if devices == 1:
    return []
  wrong = []

  def moves(purpose):
    return [g for g in found if any(p == purpose for p, _ in g.purposes)]

  images = [*moves('images'), *moves('activations'), *moves('activations (backward)')]
  if images:
    largest = max(images, key=lambda g: g.bytes)
    wrong.append(
      f'images move between devices: {sum(g.count for g in images)} collectives, the largest '
      f'{largest.kind} of {format_bytes(largest.bytes)} ({largest.text})'
    )
  method = methods.build(config)
  whole = method.joint_views * config.batch_size * network.output_size(config) * 4
  gathered = [
    g
    for g in moves('embeddings')
    if g.kind in ('all-gather', 'all-reduce') and dict(g.purposes)['embeddings'] >= whole
  ]
  if method.contrastive and not gathered:
    wrong.append(
      'the embeddings are not gathered from all devices: each device contrasts its own images only'
    )
  groups = config.model.bn_groups
  frozen = config.get('fine_tune_after_block', -1) == 4
  if groups % devices and not frozen:
    stats = jax.tree.leaves(state.state['stats'])
    expected = sum(math.prod(s.shape) for s in stats) * 4
    there = sum(
      g.count * size
      for g in moves('BatchNorm (forward)')
      for p, size in g.purposes
      if p == 'BatchNorm (forward)'
    )
    if there < expected * (groups == 1) or not there:
      wrong.append(
        f'BatchNorm of {groups} group(s) does not reach all devices: its statistics take {format_bytes(expected)}, '
        f'and {format_bytes(there)} are exchanged'
      )
  return wrong


def bounds(
  topology: hardware.Topology,
  flops: float,
  bytes_accessed: float,
  found: list[Moved],
  transfers: list[tuple[str, int]],
) -> dict[str, float]:
  """Seconds that each part of a step takes at the chip's published peaks, if nothing else took any.

  Bytes are those of the compiler's cost analysis, which counts arrays that stay on the chip, too.

  Args:
    topology: the chips.
    flops, bytes_accessed: of a device.
    found: the collectives.
    transfers: `hlo.between_slices`.
  """
  chip, slices = topology.chip, topology.slices
  seconds = {
    'compute': flops * chip.devices / chip.flops,
    'memory': bytes_accessed * chip.devices / chip.bandwidth,
    'links': sum(g.traffic for g in found) * chip.devices / chip.links,
  }
  if slices > 1 and chip.network:
    factor = {'all-reduce': 2 * (slices - 1) / slices, 'all-gather': slices - 1}
    sent = sum(size * factor.get(kind, 1) for kind, size in transfers)
    seconds['network'] = sent * chip.devices / chip.network
  return seconds
