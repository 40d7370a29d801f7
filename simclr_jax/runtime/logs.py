"""Where the metrics of a run go: metrics.jsonl, TensorBoard, and a progress line."""

import importlib.util
import json
import pathlib
import sys
import time
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from simclr_jax.runtime import files, paths


class Log:
  """metrics.jsonl, TensorBoard and the progress line."""

  def __init__(
    self, workdir: pathlib.Path, first_step: int, steps: int, tensorboard: bool, writes: bool = True
  ):
    """`writes`: whether this process writes and prints; the others do not."""
    self._lines = self._writer = None
    if writes:
      self._lines = _Lines(workdir / 'metrics.jsonl', _without_later(read(workdir), first_step))
      self._writer = _tensorboard(workdir / 'metrics') if tensorboard else None
    self._steps = steps
    terminal = sys.stderr.isatty() and writes
    self._bar = tqdm(total=steps, initial=first_step, unit='step', disable=not terminal)

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Records metrics under `step`."""
    finite = {k: v if np.isfinite(v) else None for k, v in metrics.items()}  # JSON has no NaN
    if self._lines:
      self._lines.add({'step': step, **finite})
    if self._writer:
      self._writer.write_scalars(step, metrics)

  def event(self, step: int, name: str, values: dict[str, float] | None = None) -> None:
    """Records an event of the run. Resuming does not drop it."""
    if self._lines:
      record = {'step': step, 'event': name, 'time': round(time.time(), 3), **(values or {})}
      self._lines.add(record, now=True)

  def flush(self) -> None:
    """Writes all records so far; to be called before a checkpoint is saved."""
    if self._lines:
      self._lines.flush()

  def progress(self, step: int, metrics: dict[str, float]) -> None:
    """One line: the text of the bar on a terminal, a plain line elsewhere."""
    eta = (self._steps - step) / max(metrics['steps_per_second'], 1e-9)
    accuracy = metrics.get('contrastive_acc')  # not every method has one
    text = (
      f'epoch {metrics["epoch"]:.2f}  loss {metrics["loss"]:.4f}  '
      + (f'contrastive acc {accuracy:.1%}  ' if accuracy is not None else '')
      + f'{metrics["examples_per_second"]:,.0f} images/s'
    )
    if self._bar.disable:
      print(f'step {step}/{self._steps}  {text}  ETA {tqdm.format_interval(eta)}', flush=True)
    else:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(step - self._bar.n)

  def info(self, text: str) -> None:
    """Prints a line above the bar."""
    tqdm.write(text) if not self._bar.disable else print(text, flush=True)

  def close(self) -> None:
    """Writes everything to disk."""
    self._bar.close()
    if self._lines:
      self._lines.close()
    if self._writer:
      self._writer.flush()
      self._writer.close()


class _Lines:
  """A file of JSON lines that grows.

  Objects in buckets cannot grow: there, all of the file is rewritten every `SECONDS`.
  """

  SECONDS = 30

  def __init__(self, path: pathlib.Path, records: list[dict[str, Any]]):
    self._path, self._file = path, None
    self._text = ''.join(json.dumps(r) + '\n' for r in records)
    if paths.is_remote(path):
      self._write()
    else:
      files.write_text(path, self._text)
      self._file = path.open('a')

  def add(self, record: dict[str, Any], now: bool = False) -> None:
    """Appends a line; `now`: also in a bucket."""
    line = json.dumps(record) + '\n'
    if self._file:
      self._file.write(line)
      self._file.flush()
    else:
      self._text += line
      if now or time.monotonic() - self._written > self.SECONDS:
        self._write()

  def flush(self) -> None:
    """Writes all lines so far."""
    if not self._file:
      self._write()

  def close(self) -> None:
    """Writes all lines and closes the file."""
    self._file.close() if self._file else self._write()

  def _write(self):
    try:
      self._path.write_text(self._text)
    except Exception as error:  # of whatever library reaches the bucket
      raise OSError(f'{self._path} cannot be written: {error}') from error
    self._written = time.monotonic()


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The records of a run's `metrics.jsonl`; none if there is no such file."""
  path = workdir / 'metrics.jsonl'
  records = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      records.append(json.loads(line))
    except ValueError:
      continue  # cut off when the process was killed
  return records


def _without_later(records, last_step):
  """The records without those of steps that a resumed run will repeat; an event says how far they went."""
  kept = [r for r in records if r['step'] <= last_step or 'event' in r]
  timed = [r for r in records if 'time' in r]
  if timed and timed[-1]['step'] > last_step and 'event' not in timed[-1]:
    seconds = {k: v for k, v in timed[-1].items() if k == 'time' or k.startswith('seconds_')}
    kept.append({'step': timed[-1]['step'], 'event': 'killed', **seconds})
  return kept


def _tensorboard(folder):
  if not (importlib.util.find_spec('tensorflow') and importlib.util.find_spec('tensorboard')):
    logging.warning('TensorFlow is not installed: no TensorBoard files, only metrics.jsonl')
    return None
  import tensorflow as tf
  from clu import metric_writers

  tf.config.set_visible_devices([], 'GPU')  # TensorFlow must not take the accelerator
  try:
    return metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(folder)))
  except tf.errors.OpError as error:
    raise OSError(
      f'TensorBoard files cannot be written to {folder}: {error.message.split(" [Op:")[0].split("}} ")[-1]}; '
      'use --config.tensorboard=false to train without them'
    ) from None
