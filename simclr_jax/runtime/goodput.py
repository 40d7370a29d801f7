"""Goodput: the share of the wall-clock time of a run that was spent on steps which were kept.

`metrics.jsonl` has, for each attempt (each process that worked on the run), an event 'start', and in every
record the time and the seconds that the attempt has spent so far on anything but steps.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

KINDS = ('start', 'data', 'checkpoint', 'evaluation')  # time that is not spent on steps


class Clock:
  """Measures what an attempt spends its time on.

  Attributes:
    started: seconds since 1970.
    seconds: so far, by `KINDS`: 'start' is the time until the first step is done, mostly compilation;
      'data' waiting for batches; 'checkpoint' time in which saving blocks the training.
  """

  def __init__(self):
    self.seconds = dict.fromkeys(KINDS, 0.0)
    self._created = time.monotonic()
    self.started = round(time.time(), 3)

  def first_step_done(self) -> None:
    """Ends the time that counts as 'start'."""
    self.seconds['start'] = time.monotonic() - self._created - self.seconds['data']

  @contextlib.contextmanager
  def measure(self, kind: str) -> Iterator[None]:
    """Adds the time of the block to `kind`."""
    start = time.monotonic()
    try:
      yield
    finally:
      self.seconds[kind] += time.monotonic() - start

  def fields(self) -> dict[str, float]:
    """For a record: `time`, in seconds since 1970, and `seconds_KIND`."""
    seconds = {f'seconds_{kind}': round(s, 3) for kind, s in self.seconds.items()}
    return {'time': round(time.time(), 3), **seconds}


def account(records: list[dict[str, Any]]) -> dict[str, float] | None:
  """Divides up the wall-clock time of a run over all its attempts.

  Args:
    records: of `metrics.jsonl`, in order.

  Returns:
    Seconds by `KINDS`, of 'gaps' between the attempts, of steps that were recomputed ('redone'), and of
    'steps' that were kept; `wall`, their sum; `attempts`, `steps_redone`, and `goodput`, steps / wall. None for runs
    without times.
  """
  attempts: list[list[dict[str, Any]]] = []
  for record in records:
    if record.get('event') == 'start':
      attempts.append([])
    if attempts and 'time' in record:
      attempts[-1].append(record)
  if not attempts:
    return None
  total = dict.fromkeys((*KINDS, 'gaps', 'redone', 'steps'), 0.0)
  redone_steps = 0
  for number, attempt in enumerate(attempts):
    following = attempts[number + 1 :]
    start, end = attempt[0], max(attempt, key=lambda r: r['time'])
    for kind in KINDS:
      total[kind] += end.get(f'seconds_{kind}', 0.0)
    stepping = end['time'] - start['time'] - sum(end.get(f'seconds_{k}', 0.0) for k in KINDS)
    taken = end['step'] - start['step']
    lost = max([0, *(end['step'] - later[0]['step'] for later in following)])
    lost = min(lost, taken)
    share = lost / taken if taken else 0.0
    total['redone'] += max(stepping, 0.0) * share
    total['steps'] += max(stepping, 0.0) * (1 - share)
    redone_steps += lost
    if following:
      total['gaps'] += following[0][0]['time'] - end['time']
  wall = sum(total.values())
  return {
    **total,
    'wall': wall,
    'attempts': len(attempts),
    'steps_redone': redone_steps,
    'goodput': total['steps'] / wall if wall else 0.0,
  }
