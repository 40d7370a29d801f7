"""Counts kernels, operations and bytes in a program that XLA compiled for a GPU.

`cost_analysis()` is empty for GPUs, so all is read from the optimised HLO (`compiled.as_text()`). Its schedule has one
line for each kernel: a fusion, a call of cuDNN or cuBLAS, a copy.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

from simclr_jax.compile_check import hlo

_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$')
_LINE = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(([^)]*)\)(.*)')
# Computations that an instruction runs: the body of a loop, branches, asynchronous operations.
_RUNS = re.compile(
  r'(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}'
)
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[=:][\[{]([\d,"]*)')
_KERNEL_LABELS = re.compile(r'dim_labels=\w+_(\w+)->')
_FLOW = ('while', 'conditional', 'call', 'async-start')
_NO_KERNEL = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'opt-barrier', 'partition-id',
  'replica-id', 'async-update', 'async-done', 'domain', *(f'{kind}-done' for kind in (*hlo.KINDS, 'copy')),
}  # fmt: skip
_SLICES, _UPDATE = ('dynamic-slice', 'slice', 'gather'), 'dynamic-update-slice'


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of HLO.

  Attributes:
    name: of its result.
    arrays: the results; several for a tuple.
    opcode: such as fusion.
    operands: names.
    attributes: the rest of the line.
    root: whether its result is that of the computation.
  """

  name: str
  arrays: tuple[hlo.Array, ...]
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  root: bool

  @property
  def library(self) -> str:
    """The function of a library that a custom call runs, such as __cublas$gemm; else empty."""
    target = re.search(r'custom_call_target="([^"]*)"', self.attributes)
    return target[1] if target else ''

  @property
  def called(self) -> list[str]:
    """The names of the computations that it runs."""
    return [
      name
      for one, several in _RUNS.findall(self.attributes)
      for name in ([one] if one else re.findall(r'[\w.\-]+', several))
    ]


Computation = dict[str, Instruction]  # by name, in order


@dataclasses.dataclass(frozen=True)
class Counts:
  """What a step costs on a device.

  Attributes:
    kernels: how many are launched, by kind: fusion, convolution, matrix product, copy, collective, other.
    bytes: read and written in device memory: of each kernel, its operands and results once.
    flops: floating-point operations of convolutions and matrix products with operands of 16 bits.
    float32_flops: of those with operands of 32 bits.
  """

  kernels: dict[str, int]
  bytes: float
  flops: float
  float32_flops: float


def count(text: str) -> Counts:
  """The counts of a program; a loop counts as often as it runs, and of a condition every branch once.

  Elementwise operations are not in the FLOPs: they are bound by memory. Nor is cuDNN's workspace in the bytes.

  Args:
    text: the optimised HLO.
  """
  entry, computations = parse(text)
  kernels: collections.Counter[str] = collections.Counter()
  total, flops = 0.0, collections.Counter[int]()
  for instruction, within, times in _launched(entry, computations):
    kernels[_kind(instruction)] += times
    total += times * _bytes(instruction, within, computations)
    for bits, operations in _flops(instruction, within, computations):
      flops[bits] += times * operations
  return Counts(dict(kernels.most_common()), total, flops[16], flops[32])


def parse(text: str) -> tuple[str, dict[str, Computation]]:
  """The name of the program's first computation, and all computations by name."""
  entry = ''
  computations: dict[str, Computation] = {}
  current: Computation = {}
  for line in text.splitlines():
    if header := _HEADER.match(line):
      current = computations[header[2]] = {}
      entry = header[2] if header[1] else entry
    elif match := _LINE.match(line):
      root, name, results, opcode, operands, attributes = match.groups()
      current[name] = Instruction(
        name,
        tuple(hlo.Array(d, _dimensions(s), '') for d, s in hlo.ARRAY.findall(results)),
        opcode,
        tuple(re.findall(r'%([\w.\-]+)', operands)),
        attributes,
        bool(root),
      )
  return entry, computations


def _dimensions(text):
  return tuple(int(d) for d in text.split(',') if d)


def _launched(
  name: str, computations: dict[str, Computation], times: int = 1
) -> Iterator[tuple[Instruction, Computation, int]]:
  """The kernels of a computation and of those that it runs: (instruction, its computation, how often it runs)."""
  within = computations.get(name, {})
  for instruction in within.values():
    if instruction.opcode in _FLOW:
      trips = hlo.TRIPS.search(instruction.attributes)
      for inner in instruction.called:
        yield from _launched(inner, computations, times * (int(trips[1]) if trips else 1))
    elif instruction.opcode not in _NO_KERNEL:
      yield instruction, within, times


def _kind(instruction):
  if instruction.opcode.removesuffix('-start') in hlo.KINDS:
    return 'collective'
  if instruction.library.startswith('__cudnn$conv'):
    return 'convolution'
  if instruction.library.startswith('__cublas'):
    return 'matrix product'
  known = {'fusion': 'fusion', 'copy': 'copy', 'copy-start': 'copy'}
  return known.get(instruction.opcode, 'other')


def _results(instruction):
  """The results without the workspace of a library, which is the last one, of bytes."""
  last = instruction.arrays[-1:]
  workspace = instruction.library and len(instruction.arrays) > 1 and last[0].dtype in ('s8', 'u8')
  return instruction.arrays[:-1] if workspace else instruction.arrays


def _bytes(instruction, within, computations):
  """Bytes that a kernel reads and writes."""
  if instruction.opcode == 'fusion':
    return _fusion_bytes(computations[instruction.called[0]])
  operands = dict.fromkeys(instruction.operands)
  read = sum(_size(within[name].arrays) for name in operands if name in within)
  written = _size(_results(instruction))
  return min(read, written) + written if instruction.opcode in _SLICES else read + written


def _size(arrays):
  return sum(a.bytes for a in arrays)


def _fusion_bytes(inner):
  """Bytes of a fusion; of an array that it only slices or updates, those of the part."""
  users = collections.defaultdict(list)
  for instruction in inner.values():
    for name in instruction.operands:
      users[name].append(instruction)
  root = next(i for i in inner.values() if i.root)
  results = [inner[name] for name in root.operands] if root.opcode == 'tuple' else [root]
  read = sum(_read(i, users) for i in inner.values() if i.opcode == 'parameter')
  return read + sum(_written(i, inner) for i in results)


def _read(array, users):
  """Bytes that are read of a parameter."""
  whole, parts = _size(array.arrays), 0
  for user in users[array.name]:
    if user.opcode == 'bitcast':
      parts += _read(user, users)
    elif user.operands[0] != array.name or user.opcode not in (*_SLICES, _UPDATE):
      return whole
    elif user.opcode != _UPDATE:
      parts += _size(user.arrays)
  return min(whole, parts)


def _written(result, inner):
  if result.opcode == 'bitcast':
    return _written(inner[result.operands[0]], inner)
  return _size(inner[result.operands[1]].arrays if result.opcode == _UPDATE else result.arrays)


def _flops(instruction, within, computations):
  """(bits of the operands, operations) of each convolution and matrix product of a kernel."""
  if instruction.opcode == 'fusion':
    inner = computations[instruction.called[0]]
    return [pair for i in inner.values() for pair in _flops(i, inner, computations)]
  convolution = instruction.opcode == 'convolution' or instruction.library.startswith(
    '__cudnn$conv'
  )
  if (
    not convolution
    and instruction.opcode != 'dot'
    and not instruction.library.startswith('__cublas')
  ):
    return []
  left, right = (within[name].arrays[0] for name in instruction.operands[:2])
  operations = (_convolution if convolution else _product)(instruction, left, right)
  return [(16 if left.dtype in ('bf16', 'f16') else 32, operations)]


def _product(instruction, left, right):
  """2 m n k."""
  dimensions = _CONTRACTED.findall(instruction.attributes)[0]
  k = math.prod(left.shape[int(d)] for d in re.findall(r'\d+', dimensions))
  return 2 * instruction.arrays[0].size * k


def _convolution(instruction, left, right):
  """2 x values of the output x products of each, also for gradients: `dim_labels` are those of the forward pass."""
  result = instruction.arrays[0]
  kernel, output = {
    '__cudnn$convBackwardFilter': (result, right),
    '__cudnn$convBackwardInput': (right, left),
  }.get(instruction.library, (right, result))
  labels = _KERNEL_LABELS.findall(instruction.attributes)[0]
  return 2 * output.size * kernel.size // kernel.shape[labels.index('o')]
