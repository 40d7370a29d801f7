"""Stops a run between two steps after a signal, in all processes at the same step; ends a process that hangs.

`GracefulStop` and `Watchdog` are context managers. Long loops call `check` once per iteration, which serves the
innermost open `GracefulStop` and `Watchdog` of its thread.
"""

import contextlib
import faulthandler
import os
import signal
import threading
import time
from typing import Self

import jax
from jax.experimental import multihost_utils

from simclr_jax.errors import ExitCode, Stopped
from simclr_jax.runtime import signals


class GracefulStop:
  """Turns the signals of `signals.REQUESTS` and the first Ctrl-C into a request to stop between two steps.

  Loops ask for it with `requested`. From its first call on, after the first step, a signal waits for the next call;
  before, there is nothing to save, and signals keep their meaning. A second Ctrl-C stops at once. In a multi-process
  run, a signal to one process stops all processes, at the same call of `requested`: JAX's own handler of SIGTERM stays
  installed and notifies the other processes.

  Only the main thread of a program can handle signals. In any other thread, signals keep their meaning, and only
  `request` stops the loop.

  Attributes:
    signal: number of the signal that arrived; None: no signal.
  """

  def __init__(self):
    self.signal: int | None = None
    self._distributed = jax.distributed.is_initialized()
    self._handlers: contextlib.ExitStack | None = None

  def __enter__(self) -> Self:
    self._outer, _innermost.stop = _innermost.stop, self
    return self

  def __exit__(self, *error):
    _innermost.stop = self._outer
    if self._handlers:
      self._handlers.close()

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
      signals.write('\nCtrl-C: saving after this step; press again to stop at once\n')

  def requested(self) -> bool:
    """Whether to stop here. All processes must call this method equally often."""
    if not self._handlers:
      self._handlers = contextlib.ExitStack()
      self._handlers.enter_context(
        signals.handled((signal.SIGINT, *signals.REQUESTS), self._handle)
      )
    if self._distributed and self.signal is None and _sync_point_reached():
      self.signal = signal.SIGTERM
    return self.signal is not None

  @property
  def exit_code(self) -> int:
    """The exit code of the process: 130 after Ctrl-C, 75 after another signal, 0 without a signal."""
    if self.signal is None:
      return ExitCode.SUCCESS
    return ExitCode.INTERRUPTED if self.signal == signal.SIGINT else ExitCode.PREEMPTED

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

  The stacks of all threads are printed on stderr, the exit code is 4. A thread measures the time in which the process
  runs: while it is paused (SIGSTOP, Ctrl-Z, a suspended machine), no time passes. Nothing ends a process in which that
  thread cannot run either, because C++ code hangs with Python's lock. While a nested watchdog is open, the outer one is
  paused.

  Attributes:
    FIRST: the limit in seconds for a heartbeat that may have to wait for the compiler, if larger than the usual one.
  """

  FIRST = 3600

  def __init__(self, seconds: float):
    """`seconds`: the longest time between two heartbeats; 0: no limit."""
    self._seconds = seconds
    self._ran = 0.0  # seconds in which the process ran; only the thread writes it
    self._deadline = float('inf')  # on the clock of `_ran`
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

  def heartbeat(self, compiling: bool = False) -> None:
    """Restarts the timer. `compiling`: the next heartbeat may have to wait for the compiler."""
    if not self._seconds:
      return
    seconds = max(self._seconds, self.FIRST) if compiling else self._seconds
    self._limit, self._deadline = seconds, self._ran + seconds

  def _watch(self):
    tick = min(1.0, self._seconds / 4)
    before = time.monotonic()
    while not self._done.wait(tick):
      now = time.monotonic()
      self._ran += min(now - before, 2 * tick)  # if more time has passed, the process was paused
      before = now
      if self._ran > self._deadline:
        signals.write(f'no step finished in {self._limit:g} s: stopping\n')
        faulthandler.dump_traceback(signals.STDERR)
        time.sleep(3)  # meanwhile the other processes, which wait for this one, print their stacks
        os._exit(ExitCode.HUNG)
