"""What loops do at every turn: signals, and the watchdog."""

import os
import signal
import subprocess
import sys

import pytest

from simclr_jax.errors import ExitCode, Stopped
from simclr_jax.runtime import preemption

DOGS = """
import time
from simclr_jax.runtime.preemption import Watchdog, check
Watchdog.FIRST = 0
with Watchdog(2):
  with Watchdog({inner}):
    time.sleep(3 + 7 * {inner})
    print('inner', flush=True)
  for _ in range(8):
    time.sleep(0.5)
    check()
  print('outer', flush=True)
  time.sleep(30)
"""


@pytest.mark.parametrize('inner, said', [(0, ['inner', 'outer']), (1, [])])
def test_watchdogs_inside_each_other(inner, said):
  """Breaks if the outer one counts while the inner one is there, or not afterwards, or `check` is no sign of life."""
  done = subprocess.run(
    [sys.executable, '-c', DOGS.format(inner=inner)],
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.stdout.split() == said
  assert done.returncode == ExitCode.HUNG
  assert f'no step finished in {inner or 2} s' in done.stderr
  assert 'File "<string>"' in done.stderr  # where it hung


def test_check_grants_what_a_signal_wished():
  """Breaks if an evaluation inside a training does not end at its next turn."""
  preemption.check()
  with preemption.GracefulStop():
    preemption.check()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
      preemption.check()
    assert stopped.value.args == (ExitCode.PREEMPTED,)
    with preemption.GracefulStop():
      preemption.check()  # it is the outer one's
    with pytest.raises(Stopped):
      preemption.check()
  preemption.check()
