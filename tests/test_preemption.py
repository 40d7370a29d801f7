"""Signals and the watchdog."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from simclr_jax.errors import ExitCode, Stopped
from simclr_jax.runtime import preemption

WATCHDOGS = """
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


@pytest.mark.parametrize('inner, expected', [(0, ['inner', 'outer']), (1, [])])
def test_nested_watchdogs(inner, expected):
  """Breaks if the outer watchdog is active inside the inner one or inactive after it, or `check`
  gives no heartbeat.
  """
  completed = subprocess.run(
    [sys.executable, '-c', WATCHDOGS.format(inner=inner)],
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert completed.stdout.split() == expected
  assert completed.returncode == ExitCode.HUNG
  assert f'no step finished in {inner or 2} s' in completed.stderr
  assert 'File "<string>"' in completed.stderr  # the stack of the hanging thread


def test_check_raises_after_a_signal():
  """Breaks if an evaluation during training does not stop at its next `check` after SIGTERM."""
  preemption.check()
  with preemption.GracefulStop():
    preemption.check()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
      preemption.check()
    assert stopped.value.args == (ExitCode.PREEMPTED,)
    with preemption.GracefulStop():
      preemption.check()  # the signal was for the outer one
    with pytest.raises(Stopped):
      preemption.check()
  preemption.check()


def test_threads_do_not_share_a_stop():
  """Breaks if a thread handles signals, or a request to stop one training stops another one."""
  handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  seen = []

  def work():
    with preemption.Watchdog(60), preemption.GracefulStop() as stop:
      seen.append([signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)])
      stop.request()
      with pytest.raises(Stopped) as stopped:
        preemption.check()
      seen.append(stopped.value.args)
      asked.set()
      done.wait()

  asked, done = threading.Event(), threading.Event()
  thread = threading.Thread(target=work)
  thread.start()
  asked.wait(10)
  with preemption.GracefulStop():
    preemption.check()
    done.set()
    thread.join()
    preemption.check()
  assert seen == [handlers, (ExitCode.INTERRUPTED,)]
