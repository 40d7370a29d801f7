"""Examines all images of a stream in a process of its own: a decoder that crashes costs one image, not the run.

`run` sends the stream to the process, which answers with properties of its images, block by block. If it dies or does
not answer, the images that it may have been decoding are examined one at a time, so that the one that kills it is known.
"""

import contextlib
import dataclasses
import itertools
import multiprocessing.connection
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator

import numpy as np

from simclr_jax.data import decode, special, stream
from simclr_jax.data.stream import Stream, tf
from simclr_jax.errors import ConfigError
from simclr_jax.runtime import preemption

BLOCK = 16  # images in a message
SECONDS = 120  # for a block of images, or for a single image
IDLE = 60  # seconds that the process waits for another stream
MEMORY = 0.75  # largest part of the machine's memory that it takes

START = 'import sys; from simclr_jax.data import examine; examine.serve(int(sys.argv[1]))'

Columns = dict[str, np.ndarray]
_idle: list['_Process'] = []  # the process of an earlier stream


class _Died(Exception):
  """The process ended or did not answer; the message says how."""


def run(
  source: Stream,
  progress: Callable[[int], None],
  task: Callable[[Stream], Iterator[Columns]] | None = None,
) -> tuple[list[Columns], dict[int, str]]:
  """Examines all images of a stream.

  Args:
    source: N images.
    progress: called with the number of images that are finished.
    task: `properties`, the default, or `extremes`.

  Returns:
    Blocks of properties of the images that can be decoded, in order, see `task`; and index -> name and reason of each
    of the others.

  Raises:
    ConfigError: a file of many images is damaged, or no process can be started.
  """
  found: list[Columns] = []
  bad: dict[int, str] = {}
  done = singly = 0  # finished images; how many of the next are examined one at a time
  while done < len(source):
    end = min(done + singly, len(source)) if singly else len(source)
    current = None
    try:
      for kind, *values in _messages(source, task or properties, done, end, singly > 0):
        preemption.heartbeat()
        if kind == 'start':
          (current,) = values
        else:
          columns, problems, done = values
          found.append(columns)
          bad |= problems
          progress(done)
      singly = 0
    except _Died as death:
      if current is None:
        singly = 2 * BLOCK + stream.threads(source.settings)  # as many may be in work
      else:
        bad[current] = f'{source.name(current)} {death}'
        done, singly = current + 1, end - current - 1
  return found, bad


def _messages(source, task, first, end, singly) -> Iterator[tuple]:
  """What a process says about a part of a stream.

  Yields:
    ('start', i) before image i is examined alone; ('block', columns, index -> reason, number of finished images).

  Raises:
    _Died: it ended before it had sent everything.
    ConfigError: as for `run`.
  """
  process = _idle.pop() if _idle else _Process()
  try:
    # Without what the stream has computed for this process.
    process.connection.send((dataclasses.replace(source), task, first, end, singly))
    while (message := process.receive())[0] != 'end':
      if message[0] == 'error':
        raise ConfigError(message[1])
      if message[0] == 'again':
        raise _Died('')
      yield message
    _idle.append(process)
  except BrokenPipeError:
    raise _Died('') from None
  finally:
    if process not in _idle:
      process.end()


class _Process:
  """A process that runs `serve`. It ends with this one."""

  def __init__(self):
    """Raises ConfigError if it does not start."""
    self.connection, theirs = multiprocessing.connection.Pipe()
    paths = [str(pathlib.Path(__file__).parents[2]), os.environ.get('PYTHONPATH', '')]
    self._output = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `end`)
    self._process = subprocess.Popen(
      [sys.executable, '-c', START, str(theirs.fileno())], pass_fds=[theirs.fileno()], start_new_session=True,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': os.pathsep.join(filter(None, paths))},
      stdin=subprocess.PIPE, stdout=self._output, stderr=self._output,
    )  # fmt: skip
    theirs.close()
    try:
      self.connection.recv()  # it is ready
    except EOFError:
      self._process.wait()
      raise ConfigError(
        f'the process that decodes the images did not start: {self._last_line()}'
      ) from None

  def receive(self) -> tuple:
    """The next message. Raises _Died."""
    try:
      if self.connection.poll(SECONDS):
        return self.connection.recv()
    except (EOFError, ConnectionError):
      code = self._process.wait()
      if code >= 0:  # an error of Python, not of a decoder
        raise RuntimeError(f'the process that decodes the images: {self._last_line()}') from None
      raise _Died(f'crashes the decoder ({signal.Signals(-code).name})') from None
    raise _Died(f'cannot be decoded in {SECONDS} s')

  def end(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.communicate()
    self.connection.close()
    self._output.close()

  def _last_line(self):
    self._output.seek(0)
    return (self._output.read().decode(errors='replace').strip().splitlines() or ['no message'])[-1]


# In the process.


def serve(descriptor: int) -> None:
  """Examines the streams that arrive on a connection until none comes or the process at the other end is gone."""
  for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2'):
    signal.signal(getattr(signal, name), signal.SIG_IGN)  # they are for the other process
  _limit_memory()
  threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
  connection = multiprocessing.connection.Connection(descriptor)
  connection.send(('ready',))
  while connection.poll(IDLE):
    source, task, first, end, singly = connection.recv()
    try:
      for i in range(first, end) if singly else ():
        connection.send(('start', i))
        _examine(connection, source, task, i, i + 1)
      if not singly:
        _examine(connection, source, task, first, end)
      connection.send(('end',))
    except ConfigError as error:
      connection.send(('error', str(error)))


def _limit_memory():
  """Makes this process fail, or be the first to be killed, when memory runs out."""
  total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  limit = int(MEMORY * total)
  with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
  with contextlib.suppress(OSError):
    pathlib.Path('/proc/self/oom_score_adj').write_text('1000')


def _examine(connection, source, task, first, end):
  """Sends the properties of the images from `first` to `end`."""
  part = source if end - first == len(source) else source.subset(np.arange(first, end))
  done = 0
  for block in itertools.chain(task(part), [None]):
    last = len(part) - 1 if block is None else int(block['index'][-1])
    decoded = set() if block is None else set(block['index'].tolist())
    missing = sorted(set(range(done, last + 1)) - decoded)
    problems = _problems(part, missing)
    if not all(problems.values()) and len(part) > 1:
      connection.send(('again',))  # it could not be decoded beside others, but can be alone
      return
    done = last + 1
    columns = {} if block is None else {**block, 'index': block['index'] + np.int32(first)}
    reasons = {first + i: p or f'{part.name(i)} cannot be decoded' for i, p in problems.items()}
    connection.send(('block', columns, reasons, first + done))


def _problems(source, indices) -> dict[int, str]:
  """Index -> name and reason of images that could not be decoded; '' if it can be."""
  part = source.subset(np.array(indices, int))
  return {i: part.find_problem([k]) for k, i in enumerate(indices)}


def properties(source: Stream) -> Iterator[Columns]:
  """Properties of the images that can be decoded, in order, in blocks.

  Yields:
    Columns with the names and types of the attributes of `scan.Scan`.
  """

  def examine(e):
    image, flags = decode.whole(e, source.settings)
    return {
      'index': tf.cast(e['index'], tf.int32),
      'shape': tf.shape(image)[:2],
      'kind': e['kind'],
      'rotated': e['orientation'] > 1,
      'slow': e['branch'] == decode.SPECIAL,
      'deep': e['deep'],
      'label': e['label'],
      'digest': tf.strings.to_hash_bucket_strong(e['bytes'], 2**62, [1, 2]),
      'one_colour': tf.reduce_all(image == image[:1, :1]),
      'used': tf.cast(tf.reduce_max(image), tf.int32) - tf.cast(tf.reduce_min(image), tf.int32),
      'transparent': flags[0] > 0,
      'hides': flags[1] > 0,
      'clipped': flags[2],
    }

  images = (
    decode.sized(source.iterate_once(), source.settings, skip=True, block=BLOCK)
    .map(examine, stream.threads(source.settings))
    .ignore_errors()
  )
  yield from stream.with_threads(images.batch(BLOCK), source.settings).as_numpy_iterator()


def extremes(source: Stream) -> Iterator[Columns]:
  """The lowest and highest finite value of images of more than 8 bits, in order, in blocks.

  Yields:
    `index`, int32 `[n]`; `ends`, float64 `[n, 2]`, NaN without a finite value; `floats`, bool `[n]`.
  """
  channels = source.settings.channels

  def of_values(contents, kind):
    x = special.decode(contents, int(kind), channels).colour
    finite = x[np.isfinite(x)]
    ends = [finite.min(), finite.max()] if finite.size else [np.nan, np.nan]
    return np.array(ends, np.float64), np.array(x.dtype.kind == 'f')

  def measured(e):
    ends, floats = tf.numpy_function(of_values, [e['bytes'], e['kind']], [tf.float64, tf.bool])
    return {
      'index': tf.cast(e['index'], tf.int32),
      'ends': tf.ensure_shape(ends, [2]),
      'floats': tf.ensure_shape(floats, []),
    }

  sized = decode.sized(source.iterate_once(), source.settings, skip=True, block=BLOCK)
  images = sized.map(measured, stream.threads(source.settings)).ignore_errors()
  yield from stream.with_threads(images.batch(BLOCK), source.settings).as_numpy_iterator()
