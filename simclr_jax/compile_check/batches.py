"""The largest batch of a recipe that fits into the memory of a device, by each way to save memory."""

import bisect
import itertools
import math
from collections.abc import Callable
from typing import Any

import ml_collections

from simclr_jax import config as recipes
from simclr_jax.compile_check import check
from simclr_jax.compile_check.text import format_bytes
from simclr_jax.errors import ConfigError

# The ways, as changes of recipe fields.
WAYS: dict[str, dict[str, Any]] = {
  'plain': {'rematerialize': 'false', 'accumulate_steps': 1},
  'rematerialize=true': {'rematerialize': 'true', 'accumulate_steps': 1},
  'rematerialize=parts': {'rematerialize': 'parts', 'accumulate_steps': 1},
  'accumulate_steps=8': {'rematerialize': 'false', 'accumulate_steps': 8},
}
FACTORS = (4, 5, 6, 7)  # batch sizes are these times powers of two
PREDICTIONS = 4


def sizes(unit: int, maximum: int) -> list[int]:
  """The batch sizes that are tried: `unit` times 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ... up to `maximum`."""
  factors = {f * 2**i // 4 for f in FACTORS for i in range(30) if f * 2**i % 4 == 0}
  return [unit * f for f in sorted(factors) if unit * f <= maximum]


def largest(candidates: list[int], limit: float, start: int, memory: Callable[[int], float]) -> int:
  """The largest of the candidates whose memory is at most `limit`; 0 if that of the first is larger.

  Memory grows with the batch, nearly in proportion, which says what size is tried next; between two known sizes, a
  straight line does. Three or four sizes are enough in most cases; after `PREDICTIONS`, the range that is left is halved.

  Args:
    candidates: batch sizes in ascending order.
    limit: bytes.
    start: the size near which the search begins.
    memory: of a batch size, in bytes, or inf where only 'too much' is known; called at most once for each size.
  """
  low, high = -1, len(candidates)  # the largest that fits and the smallest that does not, so far
  index, known = _below(candidates, start), {-1: (0, 0.0)}  # of an index: the size and its memory
  for tries in itertools.count(1):
    if high - low == 1:
      return candidates[low] if low >= 0 else 0
    index = min(max(index, low + 1), high - 1)
    size, needed = known[index] = candidates[index], memory(candidates[index])
    low, high = (index, high) if needed <= limit else (low, index)
    (x, y), (x2, y2) = known[low], known.get(high, (size, needed))
    if math.isinf(y2) or (tries >= PREDICTIONS and high in known):
      index = (low + high) // 2
    elif high in known and y2 > y:
      index = _below(candidates, x + (limit - y) * (x2 - x) / (y2 - y))
    else:
      index = _below(candidates, size * limit / needed)
  raise AssertionError  # the loop above returns


def _below(candidates, size):
  """The index of the largest candidate up to `size`; -1 if all are larger."""
  return bisect.bisect_right(candidates, size) - 1


def find(
  config: ml_collections.ConfigDict,
  topology: check.Topology,
  log: Callable[[str], None],
  need: Callable[[ml_collections.ConfigDict, check.Topology], tuple[float, float]] = check.need,
) -> list[dict[str, Any]]:
  """The largest batch of a recipe by each of `WAYS`.

  Args:
    config: a checked recipe.
    topology: the TPU or GPUs.
    log: called with a line for each step that was compiled.
    need: bytes of memory and seconds of a step.

  Returns:
    For each way plain data: `way`; `largest_batch`, 0 if none fits; `memory`, bytes per device of this batch;
    `relative_time`, of an image, in times of the plain step; or `refused`, why the recipe has no such step.
  """
  rows = []
  for way, changes in WAYS.items():
    try:
      rows.append({'way': way} | _largest(_with(config, changes), topology, log, way, need))
    except ConfigError as error:
      rows.append({'way': way, 'refused': str(error)})
  plain = next((r['seconds_per_image'] for r in rows if r.get('largest_batch')), math.nan)
  for row in rows:
    if row.get('largest_batch'):
      row['relative_time'] = row.pop('seconds_per_image') / plain
  return rows


def _largest(config, topology, log, way, need):
  """The row of one way, with `seconds_per_image`."""
  unit = 2 * math.lcm(topology.devices, config.model.bn_groups) * config.accumulate_steps
  candidates = sizes(unit, config.data.examples or check.IMAGENET)
  limit, found = topology.chip.hbm, {}

  def memory(size):
    needed, seconds = found[size] = need(_with(config, {'batch_size': size}), topology)
    verb = 'fits' if needed <= limit else 'does not fit'
    log(f'{way}: batch size {size:,} {verb}' + _of(needed, limit))
    return needed

  size = largest(candidates, limit, config.batch_size, memory)
  if not size:
    return {'largest_batch': 0}
  needed, seconds = found[size]
  return {'largest_batch': size, 'memory': needed, 'seconds_per_image': seconds / size}


def _of(needed, limit):
  return '' if math.isinf(needed) else f': {format_bytes(needed)} of {format_bytes(limit)}'


def _with(config, changes):
  """A checked copy of a recipe with other values of some fields."""
  changed = config.copy_and_resolve_references()
  changed.update(changes)
  recipes.check(changed)
  return changed.lock()


def table(rows: list[dict[str, Any]], devices: int) -> str:
  """The result of `find` as text."""
  lines = [f'{"":<22}{"largest batch":>14}{"per device":>12}{"memory":>12}{"time per image":>16}']
  for row in rows:
    if not row.get('largest_batch'):
      lines.append(f'{row["way"]:<22}{row.get("refused", "no batch fits")}')
      continue
    size = row['largest_batch']
    lines.append(
      f'{row["way"]:<22}{size:>14,}{size // devices:>12,}{format_bytes(row["memory"]):>12}'
      f'{row["relative_time"]:>16.2f}'
    )
  return '\n'.join(lines)
