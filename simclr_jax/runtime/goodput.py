"""Goodput: the fraction of the wall-clock time of a run that was spent on steps that did not have to be recomputed.

An attempt is the time from the start or resumption of a run to its next interruption. In `metrics.jsonl`, each attempt
starts with an event 'start', and every record has the time, and the seconds that the attempt has spent on anything
but steps so far.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

KINDS = ('start', 'data', 'checkpoint', 'evaluation')  # what time is spent on, except steps


class Clock:
  """Measures how an attempt spends its time.

  Attributes:
    started: time of the start, in seconds since 1970.
    seconds: seconds by `KINDS`: 'start' until the first step is done, mostly for compilation; 'data' in which the
      devices wait for a batch; 'checkpoint' in which saving blocks the training; 'evaluation' of the online kNN.
  """

  def __init__(self):
    self.seconds = dict.fromkeys(KINDS, 0.0)
    self._created = time.monotonic()
    self.started = round(time.time(), 3)

  def first_step_done(self) -> None:
    """Ends the time that is counted as 'start'."""
    self.seconds['start'] = time.monotonic() - self._created - self.seconds['data']

  @contextlib.contextmanager
  def measure(self, kind: str) -> Iterator[None]:
    """A context manager that adds the time of the block to `kind`, one of `KINDS`."""
    start = time.monotonic()
    try:
      yield
    finally:
      self.seconds[kind] += time.monotonic() - start

  def fields(self) -> dict[str, float]:
    """The fields of a record: `time`, in seconds since 1970, and `seconds_KIND` for each kind."""
    seconds = {f'seconds_{kind}': round(s, 3) for kind, s in self.seconds.items()}
    return {'time': round(time.time(), 3), **seconds}


def account(records: list[dict[str, Any]]) -> dict[str, float] | None:
  """The wall-clock time of a run by kind, over all attempts.

  Args:
    records: the records of `metrics.jsonl`, in order.

  Returns:
    In seconds: `KINDS`; 'gaps', the time between attempts; 'redone', steps that were lost and recomputed; 'steps', all
    other steps; 'wall', the sum. Also 'attempts' and 'steps_redone', their numbers, and 'goodput', steps / wall. None
    if no record has a time.
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
