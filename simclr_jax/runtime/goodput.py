"""Goodput: the fraction of the wall-clock time of a run that was spent on steps that did not have to be recomputed.

An attempt is the time from the start or resumption of a run to its next interruption. In `metrics.jsonl`, each attempt
starts with an event 'start', and every record has the time, and the seconds that the attempt has spent on anything
but steps so far.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

LONGEST = 3 * 366 * 86_400  # seconds between two records; more is a clock that was wrong
JITTER = 1.0  # seconds by which the clocks of two processes may differ
KINDS = ('start', 'data', 'checkpoint', 'evaluation')  # what time is spent on, except steps


class Clock:
  """Measures how an attempt spends its time.

  Only the start is read from the clock of the system. All later times are measured from it, so that they do not jump
  when somebody sets that clock.

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
    return {'time': round(self.started + time.monotonic() - self._created, 3), **seconds}


def account(records: list[dict[str, Any]]) -> dict[str, float] | None:
  """The wall-clock time of a run by kind, over all attempts.

  Between two records whose times differ by less than nothing or more than `LONGEST`, the clock of the system jumped, and
  no time is counted.

  Args:
    records: the records of `metrics.jsonl`, in order.

  Returns:
    In seconds: `KINDS`; 'gaps', the time between attempts; 'redone', steps that were lost and recomputed; 'steps', all
    other steps; 'wall', the sum. Also 'attempts', 'steps_redone' and 'jumps' of the clock, their numbers, and 'goodput',
    steps / wall. None if no record has a time.
  """
  attempts: list[list[dict[str, Any]]] = []
  for record in records:
    if record.get('event') == 'start':
      attempts.append([])
    if attempts and record.get('time') is not None:
      attempts[-1].append(record)
  attempts = [attempt for attempt in attempts if attempt]
  if not attempts:
    return None
  total = dict.fromkeys((*KINDS, 'gaps', 'redone', 'steps'), 0.0)
  redone_steps = jumps = 0
  for number, attempt in enumerate(attempts):
    following = attempts[number + 1 :]
    passed, jumped = _passed(attempt)
    others = {k: max(0.0, *(r.get(f'seconds_{k}') or 0.0 for r in attempt)) for k in KINDS}
    for kind, seconds in others.items():
      total[kind] += seconds
    stepping = max(0.0, passed - sum(others.values()))
    taken = max(0, attempt[-1]['step'] - attempt[0]['step'])
    lost = max([0, *(attempt[-1]['step'] - later[0]['step'] for later in following)])
    lost = min(lost, taken)
    share = lost / taken if taken else 0.0
    total['redone'] += stepping * share
    total['steps'] += stepping * (1 - share)
    redone_steps += lost
    gap, late = _passed([attempt[-1], *(later[0] for later in following[:1])])
    total['gaps'] += gap
    jumps += jumped + late
  wall = sum(total.values())
  return {
    **total,
    'wall': wall,
    'attempts': len(attempts),
    'steps_redone': redone_steps,
    'jumps': jumps,
    'goodput': total['steps'] / wall if wall else 0.0,
  }


def _passed(records: list[dict[str, Any]]) -> tuple[float, int]:
  """The seconds that passed between the first and the last record, and how often the clock jumped."""
  times = [r['time'] for r in records]
  steps = [after - before for before, after in zip(times, times[1:])]
  passed = sum(seconds for seconds in steps if 0 <= seconds <= LONGEST)
  return passed, sum(not -JITTER <= seconds <= LONGEST for seconds in steps)
