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


def test_runs_without_times():
  """Breaks if a run that recorded no times, by an older version, cannot be reported."""
  assert goodput.account([{'step': 1, 'loss': 2.0}]) is None
