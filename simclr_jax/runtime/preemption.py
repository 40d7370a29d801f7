"""Signals that stop a run between two steps, in all processes at the same step; and steps that hang.

`GracefulStop` and `Watchdog` are contexts. Long loops call `check` once per iteration; it serves those that are open.
"""

import faulthandler
import os
import signal
import sys
import threading
import time

import jax
from jax.experimental import multihost_utils

from simclr_jax.errors import ExitCode, Stopped


class GracefulStop:
  """Turns SIGTERM and the first Ctrl-C into a request that loops grant between two steps.

  A second Ctrl-C stops at once. In a multi-process run, a signal to one process stops all of them, at the same
  call of `requested`: JAX's own handler of SIGTERM stays in place and notifies the others.
  """

  current: 'GracefulStop | None' = None

  def __init__(self):
    self.signal: int | None = None
    self._previous: dict[int, object] = {}
    self._distributed = jax.distributed.is_initialized()

  def __enter__(self):
    for number in (signal.SIGINT,) if self._distributed else (signal.SIGTERM, signal.SIGINT):
      self._previous[number] = signal.signal(number, self._handle)
    self._outer, GracefulStop.current = GracefulStop.current, self
    return self

  def __exit__(self, *error):
    GracefulStop.current = self._outer
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _handle(self, number, frame):
    if self._distributed:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self.signal = number
    if number == signal.SIGINT:
      signal.signal(number, signal.default_int_handler)
      os.write(2, b'\nCtrl-C: saving after this step; press again to stop at once\n')

  def requested(self) -> bool:
    """Whether to stop here. All processes call it equally often."""
    if self._distributed and self.signal is None and _sync_point_reached():
      self.signal = signal.SIGTERM
    return self.signal is not None

  @property
  def exit_code(self) -> int:
    """The exit code of the process: 75 after SIGTERM, 130 after Ctrl-C, 0 without a signal."""
    codes = {signal.SIGTERM: ExitCode.PREEMPTED, signal.SIGINT: ExitCode.INTERRUPTED}
    return codes.get(self.signal, ExitCode.SUCCESS)


_calls = 0


def _sync_point_reached():
  """Whether all processes stop at this call, the same one for all of them."""
  global _calls
  _calls += 1
  return multihost_utils.reached_preemption_sync_point(_calls)


def heartbeat() -> None:
  """Tells the watchdog that work goes on; for loops that only some of the processes run."""
  if Watchdog.current:
    Watchdog.current.heartbeat(compiling=True)


def check() -> None:
  """Gives the watchdog a heartbeat and raises after a signal; long loops call it once per iteration.

  All processes call it equally often.

  Raises:
    Stopped: a signal arrived; outside a `GracefulStop`, only SIGTERM in a multi-process run.
  """
  heartbeat()
  if GracefulStop.current:
    if GracefulStop.current.requested():
      raise Stopped(GracefulStop.current.exit_code)
  elif jax.distributed.is_initialized() and _sync_point_reached():
    raise Stopped(ExitCode.PREEMPTED)


class Watchdog:
  """Ends the process when the work gives no heartbeat, for instance because another host hangs.

  The stacks of all threads are printed on stderr, the exit code is 4. A thread checks the time; if that thread is
  blocked as well, faulthandler ends the process ten seconds later, with code 1. Of nested watchdogs, only
  the inner one counts.
  """

  FIRST = 3600  # seconds, at least, for a heartbeat that may have to wait for the compiler
  current: 'Watchdog | None' = None

  def __init__(self, seconds: float):
    """`seconds`: the longest time between two heartbeats; 0: unlimited."""
    self._seconds = seconds
    self._deadline = float('inf')
    self._done = threading.Event()

  def __enter__(self):
    self._outer, Watchdog.current = Watchdog.current, self
    if self._outer:
      self._outer._pause()
    if self._seconds:
      threading.Thread(target=self._watch, daemon=True).start()
      self.heartbeat(compiling=True)
    return self

  def __exit__(self, *error):
    self._done.set()
    self._pause()
    Watchdog.current = self._outer
    if self._outer:
      self._outer.heartbeat(compiling=True)

  def _pause(self):
    self._deadline = float('inf')
    faulthandler.cancel_dump_traceback_later()

  def heartbeat(self, compiling: bool = False) -> None:
    """Restarts the time. `compiling`: something may be compiled before the next heartbeat."""
    if not self._seconds:
      return
    seconds = max(self._seconds, self.FIRST) if compiling else self._seconds
    self._deadline, self._limit = time.monotonic() + seconds, seconds
    faulthandler.dump_traceback_later(seconds + 10, exit=True, file=sys.__stderr__)

  def _watch(self):
    while not self._done.wait(min(1.0, self._seconds / 4)):
      if time.monotonic() > self._deadline:
        os.write(2, f'no step finished in {self._limit:g} s: stopping\n'.encode())
        faulthandler.dump_traceback(sys.__stderr__)
        time.sleep(3)  # the other processes, which wait for this one, print their stacks, too
        os._exit(ExitCode.HUNG)
