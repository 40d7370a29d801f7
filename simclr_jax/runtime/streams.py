"""Standard output and error of the command line, which may go away: a program goes on without them."""

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any, TextIO


def protect() -> None:
  """Makes all later writes to stdout and stderr succeed, whoever writes.

  Descriptors that are closed become /dev/null: otherwise the next file that is opened would get the number of stdout,
  and the output of libraries. A stream whose write fails becomes /dev/null, too, see `_Descriptor`. Characters that a
  stream cannot encode are escaped.
  """
  for descriptor in range(3):  # in this order, because the lowest free number is used
    try:
      os.fstat(descriptor)
    except OSError:
      os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
  sys.stdout, sys.stderr = _stream(1, sys.stdout), _stream(2, sys.stderr)


def _stream(descriptor: int, old: TextIO | None) -> TextIO:
  """A protected text stream with the settings of an old one, which is None if the descriptor was closed."""
  raw: Any = _Descriptor(descriptor, 'w', closefd=False)
  unbuffered = getattr(old, 'write_through', False)  # python -u
  return io.TextIOWrapper(
    raw if unbuffered else io.BufferedWriter(raw),
    encoding=getattr(old, 'encoding', 'utf-8'),
    errors='backslashreplace',
    line_buffering=getattr(old, 'line_buffering', True),
    write_through=unbuffered,
  )


class _Descriptor(io.FileIO):
  """A descriptor that becomes /dev/null when a write fails: its reader or terminal is gone, or the disk is full."""

  def write(self, data) -> int:
    """Writes all bytes, and returns their number; waits if the descriptor is not ready."""
    remaining = memoryview(data).cast('B')
    try:
      while len(remaining):
        written = super().write(remaining)
        if written is None:
          select.select([], [self], [])
        else:
          remaining = remaining[written:]
    except OSError as error:
      null = os.open(os.devnull, os.O_WRONLY)
      os.dup2(null, self.fileno())
      os.close(null)
      if error.errno != errno.EPIPE:  # a reader that goes away, such as `head`, has read enough
        self._report(error)
    return len(data)

  def _report(self, error):
    """Prints on the other stream, if it works, that the output of this one is lost."""
    name, other = ('stdout', 2) if self.fileno() == 1 else ('stderr', 1)
    text = f'simclr-jax: {name} cannot be written ({error.strerror}): its output is lost\n'
    with contextlib.suppress(OSError):
      os.write(other, text.encode())
