"""Signals and the watchdog."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from simclr_jax.errors import ExitCode, Stopped
from simclr_jax.runtime import preemption, signals

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


@pytest.mark.parametrize('number', signals.REQUESTS)
def test_each_request_to_stop_is_served(number):
  """Breaks if a closed terminal or a warning of Slurm ends a training without saving, or the exit
  code is not that of SIGTERM; or if the handlers stay after the training.
  """
  before = signal.getsignal(number)
  with preemption.GracefulStop() as stop:
    assert not stop.requested()
    os.kill(os.getpid(), number)
    assert stop.requested()
  assert stop.exit_code == ExitCode.PREEMPTED and stop.signal_name == number.name
  assert signal.getsignal(number) is before


def test_signals_keep_their_meaning_before_the_first_step():
  """Breaks if a signal while the data is loaded or the step compiled has to wait for the first step."""
  numbers = [*signals.REQUESTS, signal.SIGINT]
  before = list(map(signal.getsignal, numbers))
  with preemption.GracefulStop() as stop:
    assert list(map(signal.getsignal, numbers)) == before
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
    stop.requested()
    assert list(map(signal.getsignal, numbers)) != before
  assert list(map(signal.getsignal, numbers)) == before


AT_ONCE = """
import multiprocessing, os, signal, sys, time
from simclr_jax.runtime import signals
with signals.at_once():
  child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
  child.start()
  other = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
  other.start()
  time.sleep(0.2)
  other.terminate()
  other.join()
  print(other.exitcode)
  sys.modules['jax'] = None  # half imported
  try:
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(10)
  except BaseException:
    print('caught')
"""


def test_at_once():
  """Breaks if a library can catch the signal, output is lost, or worker processes stay or print."""
  command = [sys.executable, '-c', AT_ONCE]
  # A worker that stays keeps stdout open, until the time is over.
  completed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
  assert completed.stdout == f'{-signal.SIGTERM}\n'
  assert completed.returncode == ExitCode.PREEMPTED
  assert completed.stderr == 'simclr-jax: stopped by SIGUSR1\n'


def test_ignored_signals_stay_ignored():
  """Breaks if nohup does not protect a training from the end of its terminal."""
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    for context in (preemption.GracefulStop(), signals.at_once()):
      with context:
        os.kill(os.getpid(), signal.SIGHUP)
        preemption.check()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)


PAUSED = """
import time
from simclr_jax.runtime.preemption import Watchdog, check
Watchdog.FIRST = 0
with Watchdog(2):
  print('ready', flush=True)
  for _ in range(4):
    time.sleep(0.25)
    check()
  print('going on', flush=True)
  time.sleep(30)
"""


def test_a_pause_is_not_a_hang():
  """Breaks if Ctrl-Z or a suspended laptop ends a run, or a hang after a pause is not noticed."""
  process = subprocess.Popen([sys.executable, '-c', PAUSED], stdout=-1, stderr=-1, text=True)
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(signal.SIGSTOP)
  time.sleep(3)
  process.send_signal(signal.SIGCONT)
  stdout, stderr = process.communicate(timeout=60)
  assert stdout == 'going on\n' and process.returncode == ExitCode.HUNG
  assert 'no step finished in 2 s' in stderr and 'File "<string>"' in stderr


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
