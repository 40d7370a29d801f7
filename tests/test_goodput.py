"""Goodput: how the wall-clock time of a run is divided up."""

import pytest

from simclr_jax.runtime import goodput


def seconds(**kinds):
  """The fields of a record with the seconds by kind."""
  return {f'seconds_{kind}': s for kind, s in kinds.items()}


def test_two_attempts():
  """Breaks if recomputed steps count as progress, or the time between attempts is not counted."""
  records = [
    {'step': 0, 'event': 'start', 'time': 1000.0},
    {'step': 1, 'loss': 1.0, 'time': 1020.0, **seconds(start=20.0)},
    {'step': 10, 'loss': 1.0, 'time': 1050.0, **seconds(start=20.0, data=2.0, checkpoint=3.0)},
    # Killed after step 15; its last checkpoint is of step 10.
    {
      'step': 15,
      'event': 'killed',
      'time': 1065.0,
      **seconds(start=20.0, data=2.0, checkpoint=3.0),
    },
    {'step': 10, 'event': 'start', 'time': 1100.0},
    {'step': 12, 'loss': 1.0, 'time': 1110.0, **seconds(start=4.0)},
    {'step': 20, 'event': 'complete', 'time': 1135.0, **seconds(start=4.0, evaluation=1.0)},
  ]
  account = goodput.account(records)
  assert account['attempts'] == 2 and account['steps_redone'] == 5
  # The first attempt: 65 s, of which 40 s for 15 steps, 5 of them recomputed later.
  assert account['redone'] == pytest.approx(40 / 3)
  assert account['steps'] == pytest.approx(40 * 2 / 3 + 30)
  assert account['gaps'] == 35 and account['start'] == 24 and account['data'] == 2
  assert account['wall'] == pytest.approx(135)
  assert account['goodput'] == pytest.approx((40 * 2 / 3 + 30) / 135)


def attempt(start, times, first=0):
  """The records of an attempt, one step each; the last one has spent 1 s on the start and 2 s on data."""
  records = [{'step': first, 'event': 'start', 'time': start}]
  records += [{'step': first + i + 1, 'loss': 1.0, 'time': t} for i, t in enumerate(times)]
  records[-1] |= seconds(start=1.0, data=2.0)
  return records


@pytest.mark.parametrize(
  'records, jumps, wall',
  [
    (attempt(1000, [1010, 1020]), 0, 20),
    (attempt(1000, [1010, 400, 410]), 1, 20),  # set back in an attempt
    (attempt(100, [110, 1.7e9, 1.7e9 + 10]), 1, 20),  # unset at the start of the machine
    (attempt(1000, [1010, 1020]) + attempt(10, [20], 2), 1, 30),  # set back between attempts
    (attempt(1000, [1010]) + attempt(1009.8, [1020], 1), 0, 20.2),  # of two machines
    (attempt(1000, [999, 998, 997]), 0, 3),  # only the other seconds are known
    (attempt(1e299, [-1e299, 1e299]), 2, 3),
    ([{'step': 0, 'event': 'start', 'time': None}, {'step': 5, 'time': 3.0}], 0, 0),
  ],
)
def test_clocks_that_jump(records, jumps, wall):
  """Breaks if a clock that is set makes times negative, or shares that are no shares."""
  account = goodput.account(records)
  assert account['jumps'] == jumps
  assert account['wall'] == pytest.approx(wall)
  kinds = [account[k] for k in (*goodput.KINDS, 'gaps', 'redone', 'steps')]
  assert all(0 <= k <= account['wall'] for k in kinds) and sum(kinds) == account['wall']
  assert 0 <= account['goodput'] <= 1


def test_times_of_an_attempt_do_not_jump(monkeypatch):
  """Breaks if setting the clock of the machine changes the times of later records."""
  clock = goodput.Clock()
  monkeypatch.setattr(goodput.time, 'time', lambda: 0.0)
  assert 0 <= clock.fields()['time'] - clock.started < 10


def test_runs_without_times():
  """Breaks if a run that recorded no times, by an older version, cannot be reported."""
  assert goodput.account([{'step': 1, 'loss': 2.0}]) is None
