"""Stops a run between two steps after a signal, in all processes at the same step; ends a process that hangs.

`GracefulStop` and `Watchdog` are context managers. Long loops call `check` once per iteration, which serves the
innermost open `GracefulStop` and `Watchdog` of its thread.
"""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Self

import jax
from jax.experimental import multihost_utils

from simclr_jax.errors import ExitCode, Stopped

STDERR = (
  2  # file descriptor; writing to it is safe in signal handlers and while other threads are blocked
)


class GracefulStop:
  """Turns SIGTERM and the first Ctrl-C into a request to stop, which loops check between two steps.

  A second Ctrl-C stops at once. In a multi-process run, a signal to one process stops all processes, at the same
  call of `requested`: JAX's own handler of SIGTERM stays installed and notifies the other processes.

  Only the main thread of a program can handle signals. In any other thread, signals keep their meaning, and only
  `request` stops the loop.

  Attributes:
    signal: number of the signal that arrived; None: no signal.
  """

  def __init__(self):
    self.signal: int | None = None
    self._previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
    self._distributed = jax.distributed.is_initialized()

  def __enter__(self) -> Self:
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT,) if self._distributed else (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._handle)
    self._outer, _innermost.stop = _innermost.stop, self
    return self

  def __exit__(self, *error):
    _innermost.stop = self._outer
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def request(self, number: int = signal.SIGINT) -> None:
    """Asks the loop to stop, as a signal with this number does."""
    if self._distributed:
      os.kill(os.getpid(), signal.SIGTERM)  # JAX notifies the other processes
    else:
      self.signal = number

  def _handle(self, number, _frame):
    self.request(number)
    if number == signal.SIGINT:
      signal.signal(number, signal.default_int_handler)
      os.write(STDERR, b'\nCtrl-C: saving after this step; press again to stop at once\n')

  def requested(self) -> bool:
    """Whether to stop here. All processes must call this method equally often."""
    if self._distributed and self.signal is None and _sync_point_reached():
      self.signal = signal.SIGTERM
    return self.signal is not None

  @property
  def exit_code(self) -> int:
    """The exit code of the process: 75 after SIGTERM, 130 after Ctrl-C, 0 without a signal."""
    if self.signal is None:
      return ExitCode.SUCCESS
    return ExitCode.PREEMPTED if self.signal == signal.SIGTERM else ExitCode.INTERRUPTED

  @property
  def signal_name(self) -> str:
    """The name of the signal that arrived, such as 'SIGTERM'; empty without a signal."""
    return '' if self.signal is None else signal.Signals(self.signal).name


class _Innermost(threading.local):
  """The innermost open context managers of a thread."""

  stop: GracefulStop | None = None
  watchdog: 'Watchdog | None' = None


_innermost = _Innermost()
_calls = 0


def _sync_point_reached():
  """Whether JAX has chosen this call for all processes to stop at."""
  global _calls
  _calls += 1
  return multihost_utils.reached_preemption_sync_point(_calls)


def heartbeat() -> None:
  """Resets the watchdog; for loops that only some of the processes run."""
  if _innermost.watchdog:
    _innermost.watchdog.heartbeat(compiling=True)


def check() -> None:
  """Resets the watchdog, and raises after a signal. Long loops call this function once per iteration.

  All processes must call it equally often.

  Raises:
    Stopped: a signal arrived; outside a `GracefulStop`, only SIGTERM in a multi-process run.
  """
  heartbeat()
  stop = _innermost.stop
  if stop:
    if stop.requested():
      raise Stopped(stop.exit_code)
  elif jax.distributed.is_initialized() and _sync_point_reached():
    raise Stopped(ExitCode.PREEMPTED)


class Watchdog:
  """Ends the process if there is no heartbeat for too long, for instance because another host hangs.

  The stacks of all threads are printed on stderr, the exit code is 4. A thread checks the time; if that thread is
  blocked as well, faulthandler ends the process ten seconds later, with exit code 1. While a nested watchdog is
  open, the outer one is paused.

  Attributes:
    FIRST: the limit in seconds for a heartbeat that may have to wait for the compiler, if larger than the usual one.
  """

  FIRST = 3600

  def __init__(self, seconds: float):
    """`seconds`: the longest time between two heartbeats; 0: no limit."""
    self._seconds = seconds
    self._deadline = float('inf')
    self._done = threading.Event()

  def __enter__(self) -> Self:
    self._outer, _innermost.watchdog = _innermost.watchdog, self
    if self._outer:
      self._outer._pause()
    if self._seconds:
      threading.Thread(target=self._watch, daemon=True).start()
      self.heartbeat(compiling=True)
    return self

  def __exit__(self, *error):
    self._done.set()
    self._pause()
    _innermost.watchdog = self._outer
    if self._outer:
      self._outer.heartbeat(compiling=True)

  def _pause(self):
    self._deadline = float('inf')
    faulthandler.cancel_dump_traceback_later()

  def heartbeat(self, compiling: bool = False) -> None:
    """Restarts the timer. `compiling`: the next heartbeat may have to wait for the compiler."""
    if not self._seconds:
      return
    seconds = max(self._seconds, self.FIRST) if compiling else self._seconds
    self._deadline, self._limit = time.monotonic() + seconds, seconds
    faulthandler.dump_traceback_later(seconds + 10, exit=True, file=STDERR)

  def _watch(self):
    while not self._done.wait(min(1.0, self._seconds / 4)):
      if time.monotonic() > self._deadline:
        os.write(STDERR, f'no step finished in {self._limit:g} s: stopping\n'.encode())
        faulthandler.dump_traceback(STDERR)
        time.sleep(3)  # meanwhile the other processes, which wait for this one, print their stacks
        os._exit(ExitCode.HUNG)
