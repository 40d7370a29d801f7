"""Reads what a compiled program says of itself: which data it moves between devices, and what for.

The text is of XLA, after all optimisations (`compiled.as_text()`); its operations carry the names of the
modules and functions that they come from.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

KINDS = (
  'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all', 'collective-permute',
  'collective-broadcast',
)  # fmt: skip
_BITS = re.compile(r'\d+')
_COLLECTIVE = re.compile(
  rf'^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ({"|".join(KINDS)})(-start)?\((.*?)\)(?:,|$)'
)
_NAMED = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"')
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$')
_CALLED = re.compile(
  r'(?:calls|to_apply|branch_computations|called_computations)=\{?([^,}]+(?:, %[^,}]+)*)'
)
_TRANSFER = re.compile(r'^\s*%?[\w.\-]+ = \((\w+)\[([\d,]*)\].* send\(')
_LOOP = re.compile(r' while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)')
_CONSTANT = re.compile(r'^\s*%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)')
_UP_TO = re.compile(r'^\s*ROOT .* compare\([^,]*, %?([\w.\-]+)\), direction=LT')
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\]')


@dataclasses.dataclass(frozen=True)
class Array:
  """An array that a device gives or gets.

  Attributes:
    dtype: XLA's name of it, such as f32, bf16, u32.
    shape: of the array.
    name: of the operation that it comes from, `op_name`.
    moved_by: name of the collective; of several that were combined, it has one's.
    guessed: whether `name` had to be taken from the collective although it moves several arrays.
  """

  dtype: str
  shape: tuple[int, ...]
  name: str
  moved_by: str = ''
  guessed: bool = False

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def bytes(self) -> int:
    bits = _BITS.search(self.dtype)
    return self.size * max(int(bits[0]) if bits else 8, 8) // 8  # pred has a byte


@dataclasses.dataclass(frozen=True)
class Collective:
  """One exchange between devices.

  Attributes:
    kind: one of `KINDS`.
    arrays: its results: of an all-gather the whole, of a reduce-scatter the part.
    devices: how many exchange with each other.
    times: how often it runs in a step.
  """

  kind: str
  arrays: tuple[Array, ...]
  devices: int
  times: int = 1

  @property
  def bytes(self) -> int:
    """Of the whole, once: what is reduced, or what is there when all is gathered."""
    scattered = self.devices if self.kind == 'reduce-scatter' else 1
    return scattered * sum(a.bytes for a in self.arrays)

  @property
  def traffic(self) -> float:
    """Bytes that each device sends at least, in all its runs: those of a ring."""
    share = (self.devices - 1) / self.devices
    if self.kind in ('collective-permute', 'collective-broadcast'):
      share = 1.0
    return self.times * self.bytes * share * (2 if self.kind == 'all-reduce' else 1)


def collectives(text: str, devices: int) -> list[Collective]:
  """The collectives of a program, in the order of the text.

  Args:
    text: of the program.
    devices: that run it.
  """
  names = {m[1]: m[2] for line in text.splitlines() if (m := _NAMED.match(line))}
  times = _times(text)
  found: dict[str, Collective] = {}
  computation = ''
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      computation = header[1]
    match = _COLLECTIVE.match(line)
    if not match:
      continue
    name, result, kind, start, operands = match.groups()
    own = names.get(name, '')
    arrays = _ARRAY.findall(result)
    if start and kind in ('all-gather', 'collective-permute'):  # (what is given, what comes, ...)
      arrays = [a for a in arrays if a[1] or a[0] != 'u32']
      arrays = arrays[len(arrays) // 2 :]
    sources = re.findall(r'%([\w.\-]+)', operands)
    sources += [''] * (len(arrays) - len(sources))
    several = len(arrays) > 1
    parsed = tuple(
      Array(
        dtype,
        tuple(int(d) for d in shape.split(',') if d),
        names.get(source) or own,
        own,
        several and source not in names,
      )
      for (dtype, shape), source in zip(arrays, sources)
    )
    # What overlaps with computation stands in several fusions, under one channel.
    channel = re.search(r'channel_id=(\d+)', line)
    key = channel[1] if channel else f'{computation} {name}'
    found.setdefault(
      key, Collective(kind, parsed, _group(line, devices), times.get(computation, 1))
    )
  return [c for c in found.values() if c.devices > 1]


def between_slices(text: str) -> list[tuple[str, int]]:
  """What a device sends to other slices: the kind of exchange, and its part in bytes.

  The compiler splits a collective of several slices into one inside each and a transfer between hosts, in which
  names are lost.
  """
  found = []
  for line in text.splitlines():
    transfer = _TRANSFER.match(line)
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', line)
    if transfer and kind:
      array = Array(transfer[1], tuple(int(d) for d in transfer[2].split(',') if d), '')
      found.append((kind[1].lower().replace('_', '-'), array.bytes))
  return found


def _group(line, devices):
  """How many devices are in one group."""
  mesh = re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', line)
  if mesh:  # axes with their sizes, and those that are reduced: whole, or (what lies before)size
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part) if part else sizes[name] for name, part in axes)
  tiled = re.search(r'replica_groups=\[(\d+),(\d+)\]<=', line)
  if tiled:
    return int(tiled[2])
  listed = re.search(r'replica_groups=\{\{([\d,]*)\}', line)
  if listed:
    return len(listed[1].split(','))
  pairs = re.search(r'source_target_pairs=\{(.*?)\}\}', line)
  if pairs:
    return len({n for n in re.findall(r'\d+', pairs[1])})
  return devices


def _times(text):
  """computation -> how often it runs in a step; loops that count up to a constant are told by their condition."""
  callers, constants, limits, computation = {}, {}, {}, ''
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      computation, constants = header[1], {}
      continue
    if constant := _CONSTANT.match(line):
      constants[constant[1]] = int(constant[2])
    elif (condition := _UP_TO.match(line)) and condition[1] in constants:
      limits[computation] = constants[condition[1]]
    if loop := _LOOP.search(line):
      callers.setdefault(loop[2], (computation, loop[1]))
      continue
    for called in _CALLED.findall(line):
      for name in re.findall(r'[\w.\-]+', called):
        callers.setdefault(name, (computation, None))
  times = {}
  for name in callers:
    total, at, seen = 1, name, set()
    while at in callers and at not in seen:
      seen.add(at)
      at, condition = callers[at]
      total *= limits.get(condition, 1)
    times[name] = total
  return times


@dataclasses.dataclass(frozen=True)
class Known:
  """What a step works on, to be recognised where it is moved.

  Attributes:
    embeddings: shapes that embeddings of the batch may have.
    metrics: shapes of the embeddings that metrics are made of.
    similarities: shapes of matrices of similarities.
    parameters: shapes of all parameters.
    sides: height and width of views, and of the images that they are cut from.
    shuffled: values in the images that the recipe mixes between the devices; 0 if it does not.
    bank: shapes of a memory bank's part on a device, and of what is drawn from it.
  """

  embeddings: frozenset[tuple[int, ...]]
  similarities: frozenset[tuple[int, ...]]
  parameters: frozenset[tuple[int, ...]]
  sides: tuple[tuple[int, int], ...]
  metrics: frozenset[tuple[int, ...]] = frozenset()
  shuffled: int = 0
  bank: frozenset[tuple[int, ...]] = frozenset()


def purpose(array: Array, known: Known, devices: int) -> str:
  """What an array is moved for, in a word or two.

  By its shape where that says it, by the names of the modules and functions it comes from otherwise.
  """
  dims = _without_ones(array.shape)
  names = f'{array.name} {array.moved_by}'
  backward = ' (backward)' if 'transpose(' in array.name else ''
  if array.dtype == 'pred' or array.dtype[0] in 'su':
    if is_image(dims, known):  # uint8
      return 'images'
    random = re.search('threefry|random|/views|bernoulli|shuffle|permutation', names)
    return 'random numbers' if random else 'metrics'
  if 'embedding_metrics' in names:
    return 'metrics'
  is_parameter = dims in {_without_ones(p) for p in known.parameters}
  if is_parameter and len(dims) > 1 and re.search(r'transpose\(jvp\(\w', array.name):
    return 'gradients'
  if dims in {_without_ones(e) for e in known.embeddings}:
    return 'embeddings' + ('' if array.guessed else backward)
  if re.search(r'(^|/|_)bn\d*(/|$)', array.name) and len(dims) in (1, 2):
    return 'BatchNorm' + (backward or ' (forward)')
  if array.size <= 16 and not is_parameter:
    return 'metrics'
  if is_parameter:
    return 'gradients'
  if dims in {_without_ones(f) for f in known.metrics}:
    return 'metrics'
  if dims in known.bank:
    return 'memory bank'
  if is_image(dims, known):
    mixed = array.size in (known.shuffled, known.shuffled // devices)
    return 'shuffled images' if known.shuffled and mixed else 'images'
  if dims in known.similarities:
    return 'similarities' + backward
  return ('activations' if len(dims) > 2 else 'other') + backward


def is_image(shape: Sequence[int], known: Known) -> bool:
  """Whether an array has the sides of an image and three channels, in whatever order or together."""
  for h, w in known.sides:
    for block in ((h, w, 3), (h, 3 * w), (3 * h, w), (h * w, 3), (3 * h * w,)):
      rest = list(shape)
      for side in block:
        if side not in rest:
          break
        rest.remove(side)
      else:
        return True
  return False


def _without_ones(shape):
  return tuple(d for d in shape if d > 1)
