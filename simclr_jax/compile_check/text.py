"""The result of compile-check as text."""

import collections
from typing import Any

GIB = 2**30


def format_bytes(size: float | None) -> str:
  """Bytes with a unit; None is unknown."""
  if size is None:
    return 'more'
  for unit, name in ((GIB, 'GiB'), (2**20, 'MiB'), (2**10, 'KiB')):
    if abs(size) >= unit:
      return f'{size / unit:.3g} {name}' if abs(size) < 1000 * unit else f'{size / unit:.0f} {name}'
  return f'{size:.0f} B'


def report(result: dict[str, Any]) -> str:
  """The result of `check.check` for a reader."""
  r = result
  per_device = r['batch_size'] // r['devices']
  slices = f'{r["slices"]} slices of ' if r['slices'] > 1 else ''
  lines = [
    f'{r["recipe"]} on {r["topology"]}: {r["devices"]} devices ({slices}{r["device_kind"]}), {r["hosts"]} '
    f'hosts; batch {r["batch_size"]:,}, {per_device} images a device; {r["dtype"]}',
    f'compiled in {r["compile_seconds"]:.0f} s by libtpu {r["versions"]["libtpu"]}',
    *r['notes'],
  ]
  if 'flops' in r:
    lines += ['', 'Memory of a device']
    for name, size in r['memory'].items():
      if name not in ('total', 'limit'):
        lines.append(f'  {name:<12} {size / GIB:8.3f} GiB')
    total, limit = r['memory']['total'], r['memory']['limit']
    lines.append(
      f'  {"total":<12} {total / GIB:8.3f} GiB of {limit / GIB:.2f}, {total / limit:.0%}'
    )
    lines += [
      '',
      f'Work of a device in a step: {r["flops"] / 1e12:.3g} TFLOP, {r["bytes_accessed"] / 1e9:.3g} GB read '
      f'and written, {r["intensity"]:.0f} FLOP a byte',
      '',
      'Collectives in a step        number   bytes of each           devices  for',
    ]
    lines += _table(r['collectives'])
    lines += _table(
      [{**row, 'devices': r['slices'], 'purpose': 'between slices'} for row in r['between_slices']]
    )
    lines += ['', 'Time of a step, if nothing else took any, at the published peaks of the chip']
    for name, seconds in r['seconds'].items():
      mark = '  <- the bound' if name == r['bound'] else ''
      lines.append(f'  {name:<12} {1000 * seconds:8.2f} ms{mark}')
  lines.append('')
  if r['problems']:
    lines += [f'FAILS: {problem}' for problem in r['problems']]
  elif r['slices'] > 1:
    lines.append('OK: it fits')
  else:
    lines.append('OK: it fits, and what must reach all devices does')
  return '\n'.join(lines)


def _table(rows):
  """Collectives of one kind and purpose in a line."""
  groups = collections.defaultdict(list)
  for row in rows:
    groups[row['kind'], row['purpose'], row['devices']].append(row)
  lines = []
  for (kind, purpose, devices), found in groups.items():
    sizes = sorted(row['bytes'] for row in found)
    size = (
      format_bytes(sizes[0])
      if sizes[0] == sizes[-1]
      else f'{format_bytes(sizes[0])} to {format_bytes(sizes[-1])}'
    )
    count = sum(row['count'] for row in found)
    lines.append(f'  {kind:<24} {count:8}   {size:<24} {devices:6}  {purpose}')
  return lines
