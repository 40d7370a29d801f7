"""Logs the metrics of a run: metrics.jsonl, TensorBoard, and a progress line."""

import contextlib
import importlib.util
import io
import itertools
import json
import math
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging

from simclr_jax.errors import ConfigError
from simclr_jax.runtime import files, paths
from simclr_jax.runtime.progress import shows_bars, tqdm

LONGEST_LINE = 2**20  # bytes of a record


class Log:
  """Writes metrics.jsonl, TensorBoard files and the progress line of a run."""

  SECONDS = 5.0  # between two lines of progress

  def __init__(
    self,
    workdir: pathlib.Path,
    first_step: int,
    steps: int,
    tensorboard: bool,
    writes: bool = True,
    shows: bool = True,
  ):
    """Opens the files; records of steps after `first_step` are removed.

    Args:
      workdir: directory of the run.
      first_step: the step from which the run starts or resumes.
      steps: length of the training.
      tensorboard: whether TensorBoard files are written.
      writes: whether this process writes and prints; only one process of a run does.
      shows: whether the progress and other lines are printed.

    Raises:
      OSError: a file cannot be written.
    """
    self._lines = self._writer = None
    self._workdir, self._place = workdir, _place(workdir)
    if writes:
      self._lines = _Lines(workdir / 'metrics.jsonl', _up_to(read(workdir), first_step))
      self._writer = _tensorboard(workdir / 'metrics') if tensorboard else None
    self._steps = steps
    self._prints = writes and shows
    bar = self._prints and shows_bars()
    self._bar = tqdm(total=steps, initial=first_step, unit='step', disable=not bar)
    self._shown = -math.inf  # time of the last progress line
    self.restart(first_step)

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Writes a record with the metrics of a step; values that are not finite become null.

    Raises:
      OSError: the file cannot be written, or the directory of the run was deleted or moved.
    """
    self._check_place()
    finite = {k: v if np.isfinite(v) else None for k, v in metrics.items()}  # JSON has no NaN
    if self._lines:
      self._lines.add({'step': step, **finite})
    if self._writer:
      self._writer.add(step, metrics)

  def event(self, step: int, name: str, values: dict[str, float] | None = None) -> None:
    """Writes a record of an event, such as 'start'. Resuming does not remove events."""
    if self._lines:
      record = {'step': step, 'event': name, 'time': round(time.time(), 3), **(values or {})}
      self._lines.add(record, now=True)

  def flush(self) -> None:
    """Writes all buffered records; call this method before a checkpoint is saved. Errors as for `write`."""
    self._check_place()
    if self._lines:
      self._lines.flush()
    if self._writer:
      self._writer.flush()

  def _check_place(self):
    if self._lines and _place(self._workdir) != self._place:
      raise OSError(
        f'{self._workdir} was deleted or moved during the run: what was trained since the last checkpoint is lost; '
        'rerun the command with the --workdir where the checkpoints are now'
      )

  def restart(self, step: int) -> None:
    """Starts the interval over which the speed for the ETA is measured; `step`: number of finished steps."""
    self._since, self._since_step = time.monotonic(), step
    self._bar.unpause()

  def progress(self, step: int, metrics: dict[str, float], batch_size: int) -> None:
    """Shows the progress every few seconds: in the bar of a terminal or notebook, otherwise as a line of text.

    The first and the last step are always shown. Speed and ETA are shown from the second step on.

    Args:
      step: number of finished steps.
      metrics: of the last of these steps.
      batch_size: images per step.
    """
    now = time.monotonic()
    pause = self.SECONDS if self._bar.disable else 0.2
    if now - self._shown < pause and step not in (1, self._steps):
      return
    self._shown = now
    accuracy = metrics.get('contrastive_acc')  # not every method has one
    text = f'epoch {metrics["epoch"]:.2f}  loss {metrics["loss"]:.4f}' + (
      f'  contrastive acc {accuracy:.1%}' if accuracy is not None else ''
    )
    rate = (step - self._since_step) / max(now - self._since, 1e-9)
    if rate > 0:
      eta = tqdm.format_interval((self._steps - step) / rate)
      text += f'  {rate * batch_size:,.0f} images/s' + f'  ETA {eta}' * self._bar.disable
    if self._bar.disable:
      self.info(f'step {step}/{self._steps}  {text}')
    else:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(step - self._bar.n)

  def info(self, text: str) -> None:
    """Prints a line of text, on a terminal above the progress bar."""
    if self._prints:
      tqdm.write(text) if not self._bar.disable else print(text, flush=True)

  def close(self) -> None:
    """Writes all buffered records and closes the files."""
    self._bar.close()
    if self._lines:
      self._lines.close()
    if self._writer:
      self._writer.close()


class _Lines:
  """A file of JSON lines, to which records are appended.

  Objects in buckets cannot be appended to. In a bucket the entire file is rewritten, at most every `SECONDS` seconds.
  """

  SECONDS = 30

  def __init__(self, path: pathlib.Path, records: list[dict[str, Any]]):
    self._path, self._file = path, None
    self._text = ''.join(json.dumps(r) + '\n' for r in records)
    if paths.is_remote(path):
      self._write()
    else:
      files.write_text(path, self._text)
      self._file = files.append(path)

  def add(self, record: dict[str, Any], now: bool = False) -> None:
    """Appends a record; `now`: write at once, in a bucket, too."""
    line = json.dumps(record) + '\n'
    if self._file:
      self._file.write(line)
      self._file.flush()
    else:
      self._text += line
      if now or time.monotonic() - self._written > self.SECONDS:
        self._write()

  def flush(self) -> None:
    """Writes all buffered records."""
    if not self._file:
      self._write()

  def close(self) -> None:
    """Writes all buffered records and closes the file."""
    self._file.close() if self._file else self._write()

  def _write(self):
    try:
      self._path.write_text(self._text)
    except Exception as error:  # the type depends on the library that accesses the bucket
      raise OSError(f'{self._path} cannot be written: {error}') from error
    self._written = time.monotonic()


class _TensorBoard:
  """A file of TensorBoard, written without TensorFlow, whose import takes seconds.

  Objects in buckets cannot be appended to: there, `flush` and `close` write the entire file.
  """

  def __init__(self, folder: pathlib.Path):
    from tensorboard.compat.proto import event_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    name = f'events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}'
    self._path, self._event = folder / name, event_pb2.Event
    with self._sentences():
      folder.mkdir(parents=True, exist_ok=True)
      self._file = io.BytesIO() if paths.is_remote(folder) else self._path.open('wb')
    self._records = RecordWriter(self._file)
    self._write(file_version='brain.Event:2')

  def add(self, step: int, metrics: dict[str, float]) -> None:
    """Appends the metrics of a step."""
    values = [{'tag': name, 'simple_value': value} for name, value in metrics.items()]
    self._write(step=step, summary={'value': values})

  def _write(self, **fields):
    with self._sentences():
      self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
      self._file.flush()

  def flush(self) -> None:
    """Writes all buffered records."""
    if isinstance(self._file, io.BytesIO):
      with self._sentences():
        self._path.write_bytes(self._file.getvalue())

  def close(self) -> None:
    """Writes all buffered records and closes the file."""
    self.flush()
    self._file.close()

  @contextlib.contextmanager
  def _sentences(self):
    try:
      yield
    except Exception as error:  # the type depends on the library that accesses the bucket
      raise OSError(
        f'TensorBoard files cannot be written to {self._path.parent}: {getattr(error, "strerror", None) or error}; '
        'use --config.tensorboard=false to train without them'
      ) from None


def _tensorboard(folder):
  if not importlib.util.find_spec('tensorboard'):
    logging.warning('TensorBoard is not installed: metrics are written to metrics.jsonl only')
    return None
  return _TensorBoard(folder)


def _place(folder):
  """What identifies a local folder, also after it was moved; None if it does not exist or is in a bucket."""
  try:
    found = None if paths.is_remote(folder) else folder.stat()
  except OSError:
    return None
  return found and (found.st_dev, found.st_ino)


def read(workdir: pathlib.Path, most: int = 0) -> list[dict[str, Any]]:
  """The records of `metrics.jsonl` of a run, in order; empty if there is no such file.

  A record has `step`, finite numbers or null, and perhaps the name of an `event`. Lines that are no records are left
  out, with a warning unless it is the last one, which a killed process may have truncated.

  Args:
    workdir: directory of the run.
    most: if above 0, about as many records of steps are read, at equal distances; events, evaluations and the first and
      last record of each attempt are always read.

  Raises:
    ConfigError: the file cannot be read.
  """
  path = workdir / 'metrics.jsonl'
  records, damaged = [], 0
  try:
    every = -(-sum(1 for _ in _lines(path)) // most) if most else 1
    following = itertools.chain(itertools.islice(_lines(path), 1, None), [b'"event"'])
    before = b'"event"'
    for i, (line, after) in enumerate(zip(_lines(path), following)):
      ends = b'"event"' in before or b'"event"' in line or b'"event"' in after
      before = line
      if i % every and not ends and b'"knn_acc"' not in line:
        continue
      record = _record(line)
      if record:
        records.append(record)
      else:
        damaged += line.endswith(b'\n')
  except FileNotFoundError:
    return []
  except OSError as error:
    raise ConfigError(f'{path} cannot be read: {error.strerror or error}') from None
  if damaged:
    logging.warning('%s: %d lines are no records of metrics and are ignored', path, damaged)
  return records


def _lines(path) -> Iterator[bytes]:
  """The lines of a file; a longer line than a record can be is several."""
  with files.open_to_read(path) as file:
    while line := file.readline(LONGEST_LINE):
      yield line


def _record(line) -> dict[str, Any] | None:
  """The record in a line; None if it is none."""
  try:
    record = json.loads(line)
  except (ValueError, RecursionError):
    return None
  if not isinstance(record, dict) or type(record.get('step')) is not int or record['step'] < 0:
    return None
  for name, value in record.items():
    if type(value) in (int, float):
      if not -1e300 < value < 1e300:
        return None
    elif value is not None and (name != 'event' or type(value) is not str):
      return None
  return record


def _up_to(records, last_step):
  """The records without those of later steps, which a resumed run repeats; an event 'killed' has the last step."""
  remaining = [r for r in records if r['step'] <= last_step or 'event' in r]
  timed = [r for r in records if 'time' in r]
  if timed and timed[-1]['step'] > last_step and 'event' not in timed[-1]:
    seconds = {k: v for k, v in timed[-1].items() if k == 'time' or k.startswith('seconds_')}
    remaining.append({'step': timed[-1]['step'], 'event': 'killed', **seconds})
  return remaining
