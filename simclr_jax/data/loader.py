"""Batches on the devices, prefetched for the steps that need them."""

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


class Loader:
  """The batches of a run: `loader(i)` is that of step i, its rows split over the devices.

  Consecutive steps are prefetched in a thread; any other step makes the loader seek.

  Attributes:
    constants: arrays that all steps use, whole on every device.
  """

  def __init__(
    self,
    batches: Callable[[int], Iterator[Batch]],
    put: Callable[[Batch], dict[str, jax.Array]],
    constants: dict[str, jax.Array],
  ):
    self.constants = constants
    self._batches, self._put = batches, put
    self._next, self._batch, self._queue = -1, None, queue.Queue()
    self.close = lambda: None  # stops the thread, if there is one

  def ready(self, step: int) -> bool:
    """Whether the batch of this step is available without waiting."""
    return step == self._next and not (self._batch is None and self._queue.empty())

  def wait(self, step: int) -> None:
    """Waits until the batch of this step is on the devices."""
    if step != self._next:
      self._seek(step)
    if self._batch is None:
      self._batch = self._queue.get()

  def __call__(self, step: int) -> dict[str, jax.Array]:
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
        del batch  # or this frame and the error would keep each other
    self._next += 1
    return batch

  def _seek(self, step):
    self.close()
    self._next, self._batch, self._queue = step, None, queue.Queue(PREFETCH)
    stopped = threading.Event()
    args = (self._batches(step), self._put, self._queue, stopped)
    thread = threading.Thread(target=_fill, args=args, daemon=True)
    thread.start()
    self.close = weakref.finalize(self, _stop, thread, stopped, self._queue)


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
  except BaseException as error:  # for the thread that waits for it
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
    pipelines, size: of the views, which `augment.views` makes.
    mesh: the devices.

  Returns:
    Batches of `index`, `epoch`, `position`, int32 `[n]`. `with_images` adds the images.
  """
  local = sharding.local_rows(mesh, batch_size)

  def put(batch):
    return sharding.put_local_rows(mesh, batch, batch_size)

  def rows(step):
    while True:
      yield {k: v[local] for k, v in order.rows(seed, step, batch_size, len(dataset)).items()}
      step += 1

  def gathered(step):
    for batch in rows(step):
      index = batch['index']
      yield {**batch, 'images': dataset.images[index], 'label': dataset.labels[index]}

  def streamed(step):
    return _streamed(dataset, seed, batch_size, pipelines, size, local, step)

  if not isinstance(dataset, Arrays):
    return Loader(streamed, put, {})
  if not dataset.resident:
    return Loader(gathered, put, {})
  arrays = {'images': dataset.images, 'label': dataset.labels}
  return Loader(rows, put, sharding.put_replicated(mesh, arrays))


def shapes(
  examples: int,
  batch_size: int,
  views: int,
  size: int,
  resize_on: str,
  resident: tuple[int, int] | None = None,
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
  """Shapes of what a step of `for_training` gets: `constants`, and a batch. For programs that have no images.

  Args:
    examples, batch_size: of the run.
    views, size: number and side of the views.
    resize_on: where streams are resized, `data.resize_on`.
    resident: height and width of images that are kept on the devices; None for a stream.
  """
  integers = jax.ShapeDtypeStruct((batch_size,), np.int32)
  rows = dict.fromkeys(('index', 'epoch', 'position'), integers)
  if resident:
    images = jax.ShapeDtypeStruct((examples, *resident, 3), np.uint8)
    return {'images': images, 'label': jax.ShapeDtypeStruct((examples,), np.int32)}, rows
  canvas = crop.canvas_shape(size, views, resize_on)
  images = jax.ShapeDtypeStruct((batch_size, *canvas, 3), np.uint8)
  crops = jax.ShapeDtypeStruct((batch_size, views, 2, 4), np.float32)
  return {}, {**rows, 'images': images, 'crops': crops, 'label': integers}


def with_images(
  constants: dict[str, jax.Array], batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """A batch of `for_training` with `images` `[n, h, w, 3]` and `label` `[n]`, inside jit.

  Arrays that are kept on the devices are `constants`, and the batch says which; of others it has the
  images already. Of streams they are the canvases of `decode`, and `crops` `[n, views, 2, 4]`.
  """
  return {**batch, **{k: v[batch['index']] for k, v in constants.items()}}


def _streamed(dataset, seed, batch_size, pipelines, size, local, step):
  from simclr_jax.data import decode, stream  # TensorFlow is for streams alone

  encoded = dataset.train_iterator(seed, batch_size, step, local)
  canvases = decode.canvases(encoded, pipelines, size, seed, dataset.settings)
  batches = canvases.batch(len(local), drop_remainder=True).prefetch(1)

  def suspects(count):  # what is decoded in blocks may be of the next batch already
    for i in range(step + count, step + count + decode.BLOCK // len(local) + 2):
      yield from order.rows(seed, i, batch_size, len(dataset))['index'][local]

  return stream.read(batches, dataset, None if dataset.sequential else suspects)


def iterate_once(
  dataset: Dataset, pipeline: str, size: int, batch_size: int, mesh: jax.sharding.Mesh
) -> Iterator[dict[str, jax.Array]]:
  """Every image of a data set once, for an evaluation: batches on the devices.

  Args:
    dataset: images.
    pipeline, size: of the views, which `augment.eval_view` makes.
    batch_size: a multiple of the number of devices.
    mesh: the devices.

  Yields:
    `images` `[n, h, w, 3]`, with the `crops` of streams `[n, 1, 2, 4]`; `label` and `index` `[n]`,
    -1 in rows that pad the last batch.
  """
  local = sharding.local_rows(mesh, batch_size)
  part, parts = int(local[0]) // len(local), batch_size // len(local)
  if isinstance(dataset, Arrays):
    blocks = _blocks(dataset, part, parts, len(local))
  else:
    blocks = _streamed_once(dataset, pipeline, size, part, parts, len(local))
  if len(dataset) < parts:
    raise ConfigError(f'{len(dataset)} images cannot be shared among {parts} processes')
  largest, block = -(-len(dataset) // parts), {}
  for _ in range(-(-largest // len(local))):  # as many on every host
    block = next(blocks, {k: v[:0] for k, v in block.items()})
    missing = len(local) - len(block['index'])
    padded = {
      k: np.concatenate([v, np.full((missing, *v.shape[1:]), -(k in ('index', 'label')), v.dtype)])
      for k, v in block.items()
    }
    yield sharding.put_local_rows(mesh, padded, batch_size)


def _blocks(dataset, part, parts, size):
  start, end = (len(dataset) * p // parts for p in (part, part + 1))
  for at in range(start, end, size):
    index = np.arange(at, min(at + size, end), dtype=np.int32)
    yield {'images': dataset.images[index], 'label': dataset.labels[index], 'index': index}


def _streamed_once(dataset, pipeline, size, part, parts, count):
  from simclr_jax.data import decode, stream

  encoded = dataset.iterate_once(part, parts)
  batches = decode.canvases(encoded, (pipeline,), size, 0, dataset.settings).batch(count)
  for batch in stream.read(batches.prefetch(1), dataset):
    yield {k: batch[k] for k in ('images', 'crops', 'label', 'index')}
