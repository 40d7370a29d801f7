"""The signals that ask a process to stop, and what they do where there is nothing to save. This file does not import JAX."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from simclr_jax.errors import ExitCode

# Of systems that end jobs, of a terminal that is closed, of Slurm (--signal=USR1@90).
REQUESTS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STDERR = (
  2  # writing to the descriptor is safe in signal handlers and while other threads are blocked
)


@contextlib.contextmanager
def handled(
  numbers: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
  """Within this context, a function handles signals; in another thread than the main one, nothing changes.

  A signal that is ignored, as SIGHUP is by nohup, stays ignored, except Ctrl-C: shells ignore it in all background jobs
  of a script. In a multi-process run, SIGTERM stays with JAX.
  """
  previous = {}
  if threading.current_thread() is threading.main_thread():
    for number in numbers:
      old = signal.getsignal(number)
      ignored = old is signal.SIG_IGN and number != signal.SIGINT
      of_jax = number == signal.SIGTERM and _distributed()
      if old is not None and not ignored and not of_jax:  # None: the handler is not one of Python
        previous[number] = signal.signal(number, handler)
  try:
    yield
  finally:
    for number, old in previous.items():
      signal.signal(number, old)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
  """Within this context, the signals of `REQUESTS` end the process with exit code 75.

  For the command line, where nothing has to be saved. An exception would not be enough: libraries catch exceptions,
  for instance of imports, and go on in another way. In a multi-process run, where all processes have to stop together,
  the signals become requests that `preemption.check` serves.
  """
  process = os.getpid()

  def handle(number, _frame):
    if os.getpid() != process:  # a worker process, which has inherited this function
      signal.signal(number, signal.SIG_DFL)
      os.kill(os.getpid(), number)
    elif _distributed():
      os.kill(process, signal.SIGTERM)  # JAX notifies the other processes
    else:
      _end(signal.Signals(number).name)

  with handled(REQUESTS, handle):
    yield


def _end(name):
  with contextlib.suppress(RuntimeError, OSError, ValueError):  # the signal may interrupt a print
    sys.stdout.flush()
  write(f'simclr-jax: stopped by {name}\n')
  for worker in multiprocessing.active_children():
    worker.kill()
  os._exit(ExitCode.PREEMPTED)


def write(text: str) -> None:
  """Prints on stderr, if there is one: its reader may have gone away."""
  with contextlib.suppress(OSError):
    os.write(STDERR, text.encode())


def _distributed():
  """Whether this is a process of a multi-process run."""
  # JAX may be half imported.
  distributed: Any = getattr(sys.modules.get('jax'), 'distributed', None)
  return hasattr(distributed, 'is_initialized') and distributed.is_initialized()
