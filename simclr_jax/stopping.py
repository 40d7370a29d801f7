"""Stopping between two steps, in all processes at the same one; and when a step never ends.

`Stop` and `Watchdog` are contexts; `check`, which long loops call at every turn, looks after those that are open.
"""

import faulthandler
import os
import signal
import sys
import threading
import time

import jax
from jax.experimental import multihost_utils

EXIT_HUNG = 4  # a step took longer than the watchdog allows
EXIT_PREEMPTED = 75  # SIGTERM: saved; the same command goes on


class Stopped(RuntimeError):
  """A signal stopped the work; what was trained is saved. `args[0]` is the exit code."""


class Stop:
  """Turns SIGTERM and the first Ctrl-C into a wish that loops grant where it costs nothing.

  A second Ctrl-C stops at once. Of several processes, a signal to any one stops all of them, at the same
  call of `wanted`: JAX's own handler of SIGTERM is left in place, which tells the others.
  """

  current: 'Stop | None' = None

  def __init__(self):
    self.signal: int | None = None
    self._old: dict[int, object] = {}
    self._together = jax.distributed.is_initialized()

  def __enter__(self):
    for number in (signal.SIGINT,) if self._together else (signal.SIGTERM, signal.SIGINT):
      self._old[number] = signal.signal(number, self._note)
    self._outer, Stop.current = Stop.current, self
    return self

  def __exit__(self, *error):
    Stop.current = self._outer
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _note(self, number, frame):
    if self._together:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self.signal = number
    if number == signal.SIGINT:
      signal.signal(number, signal.default_int_handler)
      os.write(2, b'\nCtrl-C: saving after this step; press again to stop at once\n')

  def wanted(self) -> bool:
    """Whether to stop here. All processes call it equally often."""
    if self._together and self.signal is None and _reached():
      self.signal = signal.SIGTERM
    return self.signal is not None

  @property
  def exit_code(self) -> int:
    """The process's exit code: 75 after SIGTERM, 130 after Ctrl-C, 0 without a signal."""
    return {None: 0, signal.SIGTERM: EXIT_PREEMPTED, signal.SIGINT: 130}[self.signal]


_calls = 0


def _reached():
  """Whether all processes are to stop at this call, the same one for all of them."""
  global _calls
  _calls += 1
  return multihost_utils.reached_preemption_sync_point(_calls)


def alive() -> None:
  """A sign of life, for loops that not all processes go through."""
  if Watchdog.current:
    Watchdog.current.beat(compiling=True)


def check() -> None:
  """What long loops do at every turn: they give a sign of life, and end after a signal.

  All processes call it equally often.

  Raises:
    Stopped: a signal came; without a `Stop`, only SIGTERM to one of several processes.
  """
  alive()
  if Stop.current:
    if Stop.current.wanted():
      raise Stopped(Stop.current.exit_code)
  elif jax.distributed.is_initialized() and _reached():
    raise Stopped(EXIT_PREEMPTED)


class Watchdog:
  """Ends the process when the work gives no sign of life, as when another host hangs.

  The stacks of all threads go to stderr, the exit code is 4. A thread looks at the time; should it be kept
  from running as well, faulthandler's own ends the process ten seconds later, with code 1. Inside another one,
  only the inner one counts.
  """

  FIRST = 3600  # seconds at least for a beat that may have to wait for the compiler
  current: 'Watchdog | None' = None

  def __init__(self, seconds: float):
    """`seconds` between two beats at most; 0: for ever."""
    self._seconds = seconds
    self._deadline = float('inf')
    self._done = threading.Event()

  def __enter__(self):
    self._outer, Watchdog.current = Watchdog.current, self
    if self._outer:
      self._outer._rest()
    if self._seconds:
      threading.Thread(target=self._watch, daemon=True).start()
      self.beat(compiling=True)
    return self

  def __exit__(self, *error):
    self._done.set()
    self._rest()
    Watchdog.current = self._outer
    if self._outer:
      self._outer.beat(compiling=True)

  def _rest(self):
    self._deadline = float('inf')
    faulthandler.cancel_dump_traceback_later()

  def beat(self, compiling: bool = False) -> None:
    """A sign of life. `compiling`: before the next one, something may be compiled."""
    if not self._seconds:
      return
    seconds = max(self._seconds, self.FIRST) if compiling else self._seconds
    self._deadline, self._limit = time.monotonic() + seconds, seconds
    faulthandler.dump_traceback_later(seconds + 10, exit=True, file=sys.__stderr__)

  def _watch(self):
    while not self._done.wait(min(1.0, self._seconds / 4)):
      if time.monotonic() > self._deadline:
        os.write(2, f'nothing was finished in {self._limit:g} s: stopping\n'.encode())
        faulthandler.dump_traceback(sys.__stderr__)
        time.sleep(3)  # the others, which wait for this one, shall show their stacks, too
        os._exit(EXIT_HUNG)
