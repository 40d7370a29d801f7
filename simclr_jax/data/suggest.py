"""Suggests a recipe for a data set."""

import jax
import numpy as np

from simclr_jax.data.dataset import Arrays, Dataset


def recipe(dataset: Dataset, accelerators: int | None = None) -> tuple[str, dict[str, str]]:
  """A built-in recipe and values of its fields, by the number and size of the images.

  Args:
    dataset: the training images.
    accelerators: number of GPUs or TPU cores, 0 for a CPU; None: of this machine.

  Returns:
    The name of the recipe, and the fields to override.
  """
  if accelerators is None:
    accelerators = 0 if jax.default_backend() == 'cpu' else jax.device_count()
  count, side = len(dataset), median_side(dataset)
  if accelerators:
    variant = '32' if side <= 40 else '64' if side <= 96 else '224'
    fields = {'epochs': np.clip(128_000_000 // count, 100, 1000)}
    batch_size = 512 * accelerators
  else:
    variant = 'cpu'
    fields = {'epochs': np.clip(60_000 // count, 1, 200)}
    if side <= 48:
      fields |= {'image_size': 32, 'model.stem': 'strided'}
    batch_size = 128
  while batch_size > max(accelerators, 1) and batch_size > count // 2:
    batch_size //= 2
  fields['batch_size'] = max(batch_size, 2)
  return f'simclr_images:{variant}', {k: str(v) for k, v in fields.items()}


def median_side(dataset: Dataset) -> int:
  """The median of the shorter side of a sample of the images, in pixels."""
  if isinstance(dataset, Arrays):
    return min(dataset.images.shape[1:3])
  from simclr_jax.data import decode, stream

  sample = stream.as_stream(dataset).sample(256)
  sizes = decode.sized(sample.iterate_once(), sample.settings, skip=True).map(lambda e: e['shape'])
  sides = [min(size) for size in stream.with_threads(sizes, sample.settings).as_numpy_iterator()]
  return int(np.median([side for side in sides if side] or [224]))
