"""The progress of work that takes longer than a few seconds: a bar, or lines of text in a log."""

import sys
import time
import warnings
from typing import Self

from simclr_jax.runtime import distributed

with (
  warnings.catch_warnings()
):  # tqdm warns in a notebook without ipywidgets, where its bar is text
  warnings.simplefilter('ignore')
  from tqdm.auto import tqdm


def shows_bars() -> bool:
  """Whether a bar can be shown: in a terminal, and in a notebook."""
  ipython = sys.modules.get('IPython')
  shell = ipython and ipython.get_ipython()
  return sys.stderr.isatty() or (shell is not None and 'IPKernelApp' in shell.config)


class Bar:
  """A progress bar on stderr, in a terminal or a notebook; elsewhere a line of text every 10 seconds.

  Use it as a context manager. Processes other than process 0 show nothing.
  """

  SECONDS = 10.0

  def __init__(self, total: int, text: str, unit: str = 'image'):
    """Shows the bar.

    Args:
      total: amount of work.
      text: what is done.
      unit: of the work.
    """
    shows = distributed.is_main_process()
    bars = shows_bars()
    self._bar = tqdm(total=total, desc=text, unit=unit, disable=not (shows and bars))
    self._lines = shows and not bars
    self._text, self._total, self._unit = text, total, unit
    self._start = self._shown = time.monotonic()

  def to(self, done: int, total: int | None = None) -> None:
    """Moves the bar to `done` units; `total`: amount of work, if it has changed."""
    if total is not None:
      self._total = self._bar.total = total
    if self._lines:
      now = time.monotonic()
      if now - self._shown >= self.SECONDS and done:
        self._shown = now
        remaining = (now - self._start) * (self._total - done) / done
        print(
          f'{self._text}: {done:,}/{self._total:,} {self._unit}s, ETA {tqdm.format_interval(remaining)}',
          file=sys.stderr,
          flush=True,
        )
    else:
      self._bar.update(done - self._bar.n)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self._bar.close()


def duration(seconds: float) -> str:
  """A time as text, rounded: 'a few seconds', 'about 40 s', 'about 3 min', 'about 2.5 h'."""
  if seconds < 8:
    return 'a few seconds'
  if seconds < 90:
    return f'about {round(seconds, -1):.0f} s'
  if seconds < 90 * 60:
    return f'about {seconds / 60:.0f} min'
  return f'about {seconds / 3600:.1f} h'
