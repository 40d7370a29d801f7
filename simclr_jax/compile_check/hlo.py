"""Parses compiled HLO: the collectives of a program, and the purpose of each.

The text is XLA's optimised HLO (`compiled.as_text()`). Its operations carry `op_name`: the modules and functions
that they come from.
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
_OP_NAME = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"')
_BITCAST = re.compile(r'^\s*%?([\w.\-]+) = \S+ bitcast\(%?([\w.\-]+)\)')
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$')
_CALLEES = re.compile(
  r'(?:calls|to_apply|branch_computations|called_computations)=\{?([^,}]+(?:, %[^,}]+)*)'
)
_TRANSFER = re.compile(r'^\s*%?[\w.\-]+ = \((\w+)\[([\d,]*)\].* send\(')
_LOOP = re.compile(r' while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)')
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# The compiler for GPUs combines collectives by joining their arrays to one.
_JOINED = re.compile(
  r'^\s*%?([\w.\-]+) = .* fusion\(([^)]*)\), kind=\w+, calls=%?wrapped_concatenate'
)
_DEFINED = re.compile(r'^\s*%?([\w.\-]+) = ([a-z]\w*)\[([\d,]*)\]')
_CONSTANT = re.compile(r'^\s*%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)')
_UP_TO = re.compile(r'^\s*ROOT .* compare\([^,]*, %?([\w.\-]+)\), direction=LT')
ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\]')


# BatchNorm layers in `op_name`: bn, stem_bn, bn1, and BatchNorm_0, flax's automatic name.
_BATCH_NORM = re.compile(r'(^|/|_)(bn\d*|BatchNorm_\d+)(/|$)')
_RANDOM = re.compile('threefry|random|/views|bernoulli|shuffle|permutation')
_BACKWARD_OF_MODULE = re.compile(r'transpose\(jvp\(\w')


@dataclasses.dataclass(frozen=True)
class Array:
  """An array that a device sends or receives.

  Attributes:
    dtype: in XLA's spelling, such as f32, bf16, u32.
    shape: the dimensions.
    name: `op_name` of the operation that computes it.
    moved_by: `op_name` of the collective. A combined collective has the name of one of its parts.
    name_from_collective: whether `name` is that of a collective which moves several arrays, and so may be
      the name of another one.
  """

  dtype: str
  shape: tuple[int, ...]
  name: str
  moved_by: str = ''
  name_from_collective: bool = False

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.shape)

  @property
  def bytes(self) -> int:
    """Size in memory."""
    bits = _BITS.search(self.dtype)
    return self.size * max(int(bits[0]) if bits else 8, 8) // 8  # pred takes a byte


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation.

  Attributes:
    kind: one of `KINDS`.
    arrays: its results: of an all-gather the gathered array, of a reduce-scatter the part of a device.
    devices: size of the replica group.
    times: how often it runs per step.
  """

  kind: str
  arrays: tuple[Array, ...]
  devices: int
  times: int = 1

  @property
  def bytes(self) -> int:
    """Size of the unsplit arrays of one run: the reduced or the gathered ones."""
    scattered = self.devices if self.kind == 'reduce-scatter' else 1
    return scattered * sum(a.bytes for a in self.arrays)

  @property
  def traffic(self) -> float:
    """Bytes that each device sends per step, at least: those of a ring algorithm."""
    share = (self.devices - 1) / self.devices
    if self.kind in ('collective-permute', 'collective-broadcast'):
      share = 1.0
    return self.times * self.bytes * share * (2 if self.kind == 'all-reduce' else 1)


def collectives(text: str, devices: int) -> list[Collective]:
  """The collectives of a program, in the order of the text.

  Args:
    text: the optimised HLO.
    devices: number of devices of the program.
  """
  op_names = {m[1]: m[2] for line in text.splitlines() if (m := _OP_NAME.match(line))}
  for line in text.splitlines():
    if (m := _BITCAST.match(line)) and m[2] in op_names:
      op_names.setdefault(m[1], op_names[m[2]])
  joined = _joined(text, op_names)
  times = _times(text)
  by_channel: dict[str, Collective] = {}
  computation = ''
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      computation = header[1]
    match = _COLLECTIVE.match(line)
    if not match:
      continue
    # A collective that overlaps with computation appears in several fusions, under one channel.
    channel = re.search(r'channel_id=(\d+)', line)
    key = channel[1] if channel else f'{computation} {match[1]}'
    arrays = _arrays(match, op_names, joined)
    collective = Collective(match[3], arrays, _group_size(line, devices), times.get(computation, 1))
    by_channel.setdefault(key, collective)
  return [c for c in by_channel.values() if c.devices > 1]


def _joined(text, op_names):
  """The arrays that each fusion of `_JOINED` joins."""
  shapes = {m[1]: (m[2], _dimensions(m[3])) for x in text.splitlines() if (m := _DEFINED.match(x))}
  return {
    m[1]: [
      Array(*shapes[name], op_names.get(name, '')) for name in re.findall(r'%([\w.\-]+)', m[2])
    ]
    for line in text.splitlines()
    if (m := _JOINED.match(line))
  }


def _arrays(match, op_names, joined):
  """The results of a collective: a match of `_COLLECTIVE`."""
  name, results, kind, start, operands = match.groups()
  own = op_names.get(name, '')
  arrays = ARRAY.findall(results)
  if start and kind in ('all-gather', 'collective-permute'):  # results are (inputs, outputs, ...)
    arrays = [a for a in arrays if a[1] or a[0] != 'u32']
    arrays = arrays[len(arrays) // 2 :]
  sources = re.findall(r'%([\w.\-]+)', operands)
  sources += [''] * (len(arrays) - len(sources))
  if kind == 'all-reduce' and sources[0] in joined:
    return tuple(joined[sources[0]])
  return tuple(
    Array(
      dtype,
      _dimensions(shape),
      op_names.get(source) or own,
      own,
      len(arrays) > 1 and source not in op_names,
    )
    for (dtype, shape), source in zip(arrays, sources)
  )


def _dimensions(text):
  return tuple(int(d) for d in text.split(',') if d)


def between_slices(text: str) -> list[tuple[str, int]]:
  """The transfers of a device to other slices: the kind of each, and its bytes.

  The compiler splits a collective over several slices into one inside each slice and a transfer between hosts,
  which has no `op_name`.
  """
  transfers = []
  for line in text.splitlines():
    send = _TRANSFER.match(line)
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', line)
    if send and kind:
      array = Array(send[1], _dimensions(send[2]), '')
      transfers.append((kind[1].lower().replace('_', '-'), array.bytes))
  return transfers


def _group_size(line, devices):
  """The number of devices in one replica group."""
  mesh = re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', line)
  if mesh:  # axes with their sizes, and the reduced ones: entire, or in part as (offset)size
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
  """computation -> how often it runs per step. Trip counts are read from loops that count up to a constant."""
  callers: dict[str, tuple[str, str | None]] = {}  # computation -> (caller, loop condition)
  constants: dict[str, int] = {}
  limits: dict[str, int] = {}  # loop condition -> trip count
  computation = ''
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
      if trips := TRIPS.search(line):
        limits[loop[1]] = int(trips[1])
      continue
    for callees in _CALLEES.findall(line):
      for name in re.findall(r'[\w.\-]+', callees):
        callers.setdefault(name, (computation, None))
  return {name: _trip_count(name, callers, limits) for name in callers}


def _trip_count(computation, callers, limits):
  """The product of the trip counts of all loops around a computation."""
  total, seen = 1, set()
  while computation in callers and computation not in seen:
    seen.add(computation)
    computation, condition = callers[computation]
    total *= limits.get(condition, 1)
  return total


@dataclasses.dataclass(frozen=True)
class StepShapes:
  """Shapes of the arrays of a training step, by which its collectives are recognised. Without axes of size 1.

  Attributes:
    embeddings: embeddings of the batch.
    similarities: matrices of similarities.
    parameters: all parameters, and the parts of them on a device.
    image_sizes: height and width of the views, and of the images that they are cropped from.
    metrics: embeddings from which metrics are computed.
    shuffled: number of values in the images that ShuffleBN moves between devices; 0 without it.
    sharded_rows: one row of each array that is split over the devices by rows, such as a memory bank.
    channels: of the images.
  """

  embeddings: frozenset[tuple[int, ...]]
  similarities: frozenset[tuple[int, ...]]
  parameters: frozenset[tuple[int, ...]]
  image_sizes: tuple[tuple[int, int], ...]
  metrics: frozenset[tuple[int, ...]] = frozenset()
  shuffled: int = 0
  sharded_rows: frozenset[tuple[int, ...]] = frozenset()
  channels: int = 3


def purpose(array: Array, shapes: StepShapes, devices: int) -> str:
  """What an array is moved for, such as 'embeddings' or 'BatchNorm (forward)'.

  Args:
    array: moved by a collective.
    shapes: of the arrays of the step.
    devices: number of devices of the program.
  """
  dims = squeeze(array.shape)
  rows = _merge_gathered_axes(dims, devices)
  backward = ' (backward)' if 'transpose(' in array.name else ''
  image = is_image(dims, shapes)
  if array.dtype == 'pred' or array.dtype[0] in 'su':
    random = _RANDOM.search(f'{array.name} {array.moved_by}')
    return 'images' if image else 'random numbers' if random else 'metrics'
  parameter = dims in shapes.parameters
  shuffled = shapes.shuffled and array.size in (shapes.shuffled, shapes.shuffled // devices)
  # The first rule that holds. Shapes may coincide, so names that are certain come before shapes.
  rules = (
    ('metrics', 'embedding_metrics' in f'{array.name} {array.moved_by}'),
    ('gradients', parameter and len(dims) > 1 and _BACKWARD_OF_MODULE.search(array.name)),
    ('embeddings' + backward * (not array.name_from_collective), rows in shapes.embeddings),
    ('BatchNorm' + (backward or ' (forward)'), len(dims) in (1, 2) and _BATCH_NORM.search(array.name)),
    ('metrics', array.size <= 16 and not parameter),
    ('gradients', parameter),
    ('metrics', dims in shapes.metrics),
    ('memory bank', dims[1:] in shapes.sharded_rows),
    ('shuffled images', image and shuffled),
    ('images', image),
    ('similarities' + backward, rows in shapes.similarities),
    ('activations' + backward, len(dims) > 2),
  )  # fmt: skip
  return next((name for name, holds in rules if holds), 'other' + backward)


def _merge_gathered_axes(dims, devices):
  """[devices, n / devices, d] -> [n, d]: XLA may gather rows along an axis of their own."""
  if len(dims) > 2 and dims[0] == devices:
    return (dims[0] * dims[1], *dims[2:])
  return dims


def is_image(dims: Sequence[int], shapes: StepShapes) -> bool:
  """Whether an array has the height, width and channels of an image, in any order, merged or not."""
  c = shapes.channels
  for h, w in shapes.image_sizes:
    for block in ((h, w, c), (h, c * w), (c * h, w), (h * w, c), (c * h * w,)):
      rest = list(dims)
      for side in squeeze(block):
        if side not in rest:
          break
        rest.remove(side)
      else:
        return True
  return False


def squeeze(shape: Sequence[int]) -> tuple[int, ...]:
  """A shape without axes of size 1."""
  return tuple(d for d in shape if d > 1)
