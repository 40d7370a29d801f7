"""Batches on the devices, prefetched for the next steps."""

import functools
import queue
import threading
import weakref
from collections.abc import Callable, Iterator

import jax
import numpy as np

from simclr_jax import sharding
from simclr_jax.data import crop, order
from simclr_jax.data.dataset import Arrays, Dataset
from simclr_jax.errors import ConfigError

PREFETCH = 2  # batches on the devices that no step has used yet

Batch = dict[str, np.ndarray]
DeviceBatch = dict[str, jax.Array]


class Loader:
  """The batches of a run: `loader(i)` is the batch of step i, whose rows are split over the devices.

  Consecutive steps are prefetched in a thread; any other step makes the loader seek.

  Attributes:
    constants: arrays that all steps use, replicated on every device.
  """

  def __init__(
    self,
    batches: Callable[[int], Iterator[Batch]],
    put: Callable[[Batch], DeviceBatch],
    constants: DeviceBatch,
  ):
    """A loader.

    Args:
      batches: first step -> the batches of this process from that step on.
      put: transfers a batch to the devices.
      constants: see the class.
    """
    self.constants = constants
    self._batches, self._put = batches, put
    self._next = -1
    self._batch: DeviceBatch | BaseException | None = None
    self._queue: queue.Queue[DeviceBatch | BaseException] = queue.Queue()
    self._finalizer: weakref.finalize | None = None

  def ready(self, step: int) -> bool:
    """Whether the batch of this step is available without waiting."""
    return step == self._next and not (self._batch is None and self._queue.empty())

  def wait(self, step: int) -> None:
    """Waits until the batch of this step is on the devices, or reading it has failed."""
    if step != self._next:
      self._seek(step)
    if self._batch is None:
      self._batch = self._queue.get()

  def __call__(self, step: int) -> DeviceBatch:
    """The batch of a step.

    Raises:
      ConfigError: an image cannot be read.
    """
    self.wait(step)
    batch, self._batch = self._batch, None
    if isinstance(batch, BaseException):
      self._next = -1
      try:
        raise batch
      finally:
        del batch  # otherwise this frame and the error keep each other alive
    assert batch is not None
    self._next += 1
    return batch

  def close(self) -> None:
    """Stops prefetching. A batch that is already in the queue is dropped."""
    if self._finalizer:
      self._finalizer()
    self._next, self._batch = -1, None

  def _seek(self, step):
    self.close()
    self._next, self._batch, self._queue = step, None, queue.Queue(PREFETCH)
    stopped = threading.Event()
    args = (self._batches(step), self._put, self._queue, stopped)
    thread = threading.Thread(target=_fill, args=args, daemon=True)
    thread.start()
    self._finalizer = weakref.finalize(self, _stop, thread, stopped, self._queue)


def _fill(batches, put, ready, stopped):
  try:
    for batch in batches:
      item = put(batch)
      while not stopped.is_set():
        try:
          ready.put(item, timeout=0.1)
          break
        except queue.Full:
          pass
      if stopped.is_set():
        return
  except BaseException as error:  # raised again in the thread that waits for the batch
    ready.put(error)


def _stop(thread, stopped, ready):
  stopped.set()
  while not ready.empty():
    ready.get_nowait()
  thread.join(timeout=30)


def for_training(
  dataset: Dataset,
  seed: int,
  batch_size: int,
  pipelines: tuple[str, ...],
  size: int,
  mesh: jax.sharding.Mesh,
) -> Loader:
  """The endless sequence of batches of a run.

  Args:
    dataset: the training images.
    seed, batch_size: of the run.
    pipelines, size: of the views that `augment.views` will compute.
    mesh: the devices.

  Returns:
    Batches of `index`, `epoch`, `position`, int32 `[n]`. `with_images` adds the images.
  """
  local = sharding.local_rows(mesh, batch_size)

  def put(batch):
    return sharding.put_local_rows(mesh, batch, batch_size)

  if not isinstance(dataset, Arrays):
    streamed = functools.partial(_streamed, dataset, seed, batch_size, pipelines, size, local)
    return Loader(streamed, put, {})
  rows = functools.partial(_rows, len(dataset), seed, batch_size, local)
  if not dataset.resident:
    return Loader(functools.partial(_gathered, dataset, rows), put, {})
  arrays = {'images': dataset.images, 'label': dataset.labels}
  return Loader(rows, put, sharding.put_replicated(mesh, arrays))


def _rows(examples, seed, batch_size, local, step) -> Iterator[Batch]:
  while True:
    yield {k: v[local] for k, v in order.rows(seed, step, batch_size, examples).items()}
    step += 1


def _gathered(dataset: Arrays, rows, step) -> Iterator[Batch]:
  for batch in rows(step):
    index = batch['index']
    yield {**batch, 'images': dataset.images[index], 'label': dataset.labels[index]}


def _streamed(dataset: Dataset, seed, batch_size, pipelines, size, local, step) -> Iterator[Batch]:
  from simclr_jax.data import decode, stream  # TensorFlow is needed for streams only

  source = stream.as_stream(dataset)
  encoded = source.train_iterator(seed, batch_size, step, local)
  canvases = decode.canvases(encoded, pipelines, size, seed, source.settings)
  batches = canvases.batch(len(local), drop_remainder=True).prefetch(1)

  def suspects(count):  # a block that is decoded at once may include images of later batches
    for i in range(step + count, step + count + decode.BLOCK // len(local) + 2):
      yield from order.rows(seed, i, batch_size, len(source))['index'][local]

  return stream.read(batches, source, None if source.sequential else suspects)


def shapes(
  examples: int,
  batch_size: int,
  views: int,
  size: int,
  resize_on: str,
  resident: tuple[int, int] | None = None,
  channels: int = 3,
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
  """Shapes of the `constants` and of a batch of `for_training`, to compile a step without images.

  Args:
    examples, batch_size: of the run.
    views, size: number and side of the views.
    resize_on: where streams are resized, `data.resize_on`.
    resident: height and width of images that are kept on the devices; None for a stream.
    channels: of the images.
  """
  integers = jax.ShapeDtypeStruct((batch_size,), np.int32)
  rows = dict.fromkeys(('index', 'epoch', 'position'), integers)
  if resident:
    images = jax.ShapeDtypeStruct((examples, *resident, channels), np.uint8)
    return {'images': images, 'label': jax.ShapeDtypeStruct((examples,), np.int32)}, rows
  canvas = crop.canvas_shape(size, views, resize_on)
  images = jax.ShapeDtypeStruct((batch_size, *canvas, channels), np.uint8)
  crops = jax.ShapeDtypeStruct((batch_size, views, 2, 4), np.float32)
  return {}, {**rows, 'images': images, 'crops': crops, 'label': integers}


def with_images(constants: DeviceBatch, batch: DeviceBatch) -> DeviceBatch:
  """Adds `images` `[n, h, w, c]` and `label` `[n]` to a batch of `for_training`, inside jit.

  Images that are kept on the devices are `constants`, from which the batch selects by `index`; other batches
  have their images already. The images of streams are the canvases of `decode`, with `crops` `[n, views, 2, 4]`.
  """
  return {**batch, **{k: v[batch['index']] for k, v in constants.items()}}


def iterate_once(
  dataset: Dataset, pipeline: str, size: int, batch_size: int, mesh: jax.sharding.Mesh
) -> Iterator[DeviceBatch]:
  """Every image of a data set once, for an evaluation: batches on the devices.

  Args:
    dataset: images.
    pipeline, size: of the views that `augment.eval_view` will compute.
    batch_size: a multiple of the number of devices.
    mesh: the devices.

  Yields:
    `images` `[n, h, w, c]`, with the `crops` of streams `[n, 1, 2, 4]`; `label` and `index` `[n]`,
    -1 in the padding of the last batch.

  Raises:
    ConfigError: an image cannot be read, or there are fewer images than processes.
  """
  local = sharding.local_rows(mesh, batch_size)
  part, parts = int(local[0]) // len(local), batch_size // len(local)
  if isinstance(dataset, Arrays):
    blocks = _blocks(dataset, part, parts, len(local))
  else:
    blocks = _streamed_once(dataset, pipeline, size, part, parts, len(local))
  if len(dataset) < parts:
    raise ConfigError(f'{len(dataset)} images are too few for {parts} processes')
  largest_part = -(-len(dataset) // parts)
  block: Batch = {}
  for _ in range(-(-largest_part // len(local))):  # as many batches on every host
    block = next(blocks, {k: v[:0] for k, v in block.items()})
    missing = len(local) - len(block['index'])
    padded = {
      k: np.concatenate([v, np.full((missing, *v.shape[1:]), -(k in ('index', 'label')), v.dtype)])
      for k, v in block.items()
    }
    yield sharding.put_local_rows(mesh, padded, batch_size)


def _blocks(dataset: Arrays, part, parts, size) -> Iterator[Batch]:
  start, end = (len(dataset) * p // parts for p in (part, part + 1))
  for i in range(start, end, size):
    index = np.arange(i, min(i + size, end), dtype=np.int32)
    yield {'images': dataset.images[index], 'label': dataset.labels[index], 'index': index}


def _streamed_once(dataset: Dataset, pipeline, size, part, parts, count) -> Iterator[Batch]:
  from simclr_jax.data import decode, stream

  source = stream.as_stream(dataset)
  encoded = source.iterate_once(part, parts)
  batches = decode.canvases(encoded, (pipeline,), size, 0, source.settings).batch(count)
  for batch in stream.read(batches.prefetch(1), source):
    yield {k: batch[k] for k in ('images', 'crops', 'label', 'index')}
