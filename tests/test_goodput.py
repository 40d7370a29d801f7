"""Where the wall-clock time of a run went."""

import pytest

from simclr_jax.runtime import goodput


def seconds(**kinds):
  return {f'seconds_{kind}': s for kind, s in kinds.items()}


def test_two_attempts():
  """Breaks if redone steps count as progress, or the time between attempts is forgotten."""
  records = [
    {'step': 0, 'event': 'start', 'time': 1000.0},
    {'step': 1, 'loss': 1.0, 'time': 1020.0, **seconds(start=20.0)},
    {'step': 10, 'loss': 1.0, 'time': 1050.0, **seconds(start=20.0, data=2.0, checkpoint=3.0)},
    # Killed after step 15; its last checkpoint was that of step 10.
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
  found = goodput.account(records)
  assert found['attempts'] == 2 and found['steps_redone'] == 5
  # The first attempt: 65 s, of which 40 s for 15 steps, 5 of them in vain.
  assert found['redone'] == pytest.approx(40 / 3)
  assert found['steps'] == pytest.approx(40 * 2 / 3 + 30)
  assert found['gaps'] == 35 and found['start'] == 24 and found['data'] == 2
  assert found['wall'] == pytest.approx(135)
  assert found['goodput'] == pytest.approx((40 * 2 / 3 + 30) / 135)


def test_runs_without_times():
  """Breaks if an old run cannot be reported on."""
  assert goodput.account([{'step': 1, 'loss': 2.0}]) is None
