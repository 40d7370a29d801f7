"""Which recipe suits a data set."""

import numpy as np

from simclr_jax.data.dataset import Arrays, Dataset


def recipe(dataset: Dataset, accelerators: int) -> tuple[str, dict[str, str]]:
  """A built-in recipe and values of its fields, for images of this number and size.

  Args:
    dataset: the training images.
    accelerators: number of GPUs or TPU cores; 0: only a CPU.
  """
  count, side = len(dataset), median_side(dataset)
  if accelerators:
    variant = '32' if side <= 40 else '64' if side <= 96 else '224'
    chosen = {'epochs': np.clip(128_000_000 // count, 100, 1000)}
    most = 512 * accelerators
  else:
    variant = 'cpu'
    chosen = {'epochs': np.clip(60_000 // count, 1, 200)}
    if side <= 48:
      chosen |= {'image_size': 32, 'model.stem': 'strided'}
    most = 128
  together = max(accelerators, 1)
  while most > together and most > count // 2:
    most //= 2
  chosen['batch_size'] = max(most, 2)
  return f'simclr_images:{variant}', {k: str(v) for k, v in chosen.items()}


def median_side(dataset: Dataset) -> int:
  """The median of the shorter side, in pixels, of some of the images."""
  if isinstance(dataset, Arrays):
    return min(dataset.images.shape[1:3])
  from simclr_jax.data import decode, stream

  few = dataset.sample(256)
  sizes = decode.sized(few.iterate_once(), few.settings, skip=True).map(lambda e: e['shape'])
  sides = [min(size) for size in stream.with_threads(sizes, few.settings).as_numpy_iterator()]
  return int(np.median([side for side in sides if side] or [224]))
