"""The result of compile-check as text."""

import collections
from typing import Any

GIB = 2**30
# The keys of a result's `seconds`, for readers; on GPUs, the links are NVLink or PCIe.
RESOURCES = {'compute': 'compute', 'memory': 'HBM', 'links': 'ICI', 'network': 'DCN'}
GPU_RESOURCES = {'compute': 'compute', 'memory': 'memory', 'links': 'links'}


def format_bytes(size: float) -> str:
  """Bytes with a binary unit, such as '4 MiB'."""
  for unit, name in ((GIB, 'GiB'), (2**20, 'MiB'), (2**10, 'KiB')):
    if abs(size) >= unit:
      return f'{size / unit:.3g} {name}' if abs(size) < 1000 * unit else f'{size / unit:.0f} {name}'
  return f'{size:.0f} B'


def report(result: dict[str, Any]) -> str:
  """The result of `check.check` as text."""
  r = result
  per_device = r['batch_size'] // r['devices']
  slices = f'{r["slices"]} slices of ' if r['slices'] > 1 else ''
  lines = [
    f'{r["recipe"]} on {r["topology"]}: {r["devices"]} devices ({slices}{r["device_kind"]}), {r["hosts"]} '
    f'hosts; batch size {r["batch_size"]:,}, {per_device} images per device; {r["dtype"]}',
    f'compiled in {r["compile_seconds"]:.0f} s by {" ".join(list(r["versions"].items())[-1])}',
    *r['notes'],
  ]
  if 'flops' in r:
    lines += _measurements(r)
  lines.append('')
  if r['problems']:
    lines += [f'FAILS: {problem}' for problem in r['problems']]
  elif r['slices'] > 1:
    lines.append('OK: it fits into memory')
  else:
    lines.append('OK: it fits into memory; negatives and BatchNorm statistics reach all devices')
  return '\n'.join(lines)


def _measurements(r):
  """Memory, operations, collectives and times."""
  lines = ['', 'Memory per device']
  for name, size in r['memory'].items():
    if name not in ('total', 'limit'):
      lines.append(f'  {name:<12} {size / GIB:8.3f} GiB')
  total, limit = r['memory']['total'], r['memory']['limit']
  lines += [
    f'  {"total":<12} {total / GIB:8.3f} GiB of {limit / GIB:.2f}, {total / limit:.0%}',
    '',
    f'Per device and step: {r["flops"] / 1e12:.3g} TFLOP, {r["bytes_accessed"] / 1e9:.3g} GB read '
    f'and written, {r["intensity"]:.0f} FLOP/byte',
    *_kernels(r),
    '',
    'Collectives per step          count   bytes of each           devices  purpose',
    *_table(r['collectives']),
    *_table(
      [{**row, 'devices': r['slices'], 'purpose': 'between slices'} for row in r['between_slices']]
    ),
    '',
    'Roofline: time per step at the published peaks of the chip',
  ]
  names = GPU_RESOURCES if 'kernels' in r else RESOURCES
  for name, seconds in r['seconds'].items():
    mark = '  <- bottleneck' if name == r['bound'] else ''
    lines.append(f'  {names[name]:<12} {1000 * seconds:8.2f} ms{mark}')
  return lines


def _kernels(r):
  """One line for the kernels of a GPU."""
  if 'kernels' not in r:
    return []
  kinds = ', '.join(f'{kind} {n:,}' for kind, n in r['kernels'].items())
  return [
    f'Kernels per step: {sum(r["kernels"].values()):,} ({kinds}); of the operations, '
    f'{r["float32_flops"] / 1e12:.3g} TFLOP are in float32'
  ]


def _table(rows):
  """One line for all collectives of the same kind and purpose."""
  groups = collections.defaultdict(list)
  for row in rows:
    groups[row['kind'], row['purpose'], row['devices']].append(row)
  lines = []
  for (kind, purpose, devices), equal in groups.items():
    sizes = [row['bytes'] for row in equal]
    low, high = min(sizes), max(sizes)
    size = format_bytes(low) if low == high else f'{format_bytes(low)} to {format_bytes(high)}'
    count = sum(row['count'] for row in equal)
    lines.append(f'  {kind:<24} {count:8}   {size:<24} {devices:6}  {purpose}')
  return lines
