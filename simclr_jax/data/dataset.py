"""The interface of every data set, and the data set that is an array in memory."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Protocol, Self

import ml_collections
import numpy as np

from simclr_jax.errors import ConfigError
from simclr_jax.runtime.checksum import crc32

ON_DEVICE = 4 * 2**30  # bytes of images up to which a data set is kept in device memory
MAX_CLASSES = 1_000_000  # of labels without names


class Dataset(Protocol):
  """Images, with or without labels: either `Arrays`, or a stream of encoded images (`stream.Stream`)."""

  @property
  def labels(self) -> np.ndarray:
    """int32 `[N]`, -1 where unknown. TFRecord and ArrayRecord files are read once for them."""
    ...

  @property
  def labelled(self) -> bool:
    """Whether every image has a label."""
    ...

  @property
  def classes(self) -> int:
    """Number of classes; 0 without labels."""
    ...

  @property
  def class_names(self) -> Sequence[str]:
    """Names of the classes, in the order of the label numbers; empty without labels."""
    ...

  def __len__(self) -> int:
    """Number of images."""
    ...

  def names(self) -> Sequence[str] | None:
    """Names of the images, such as their paths below the folder; None if they have only indices."""
    ...

  def fingerprint(self) -> int:
    """A checksum that differs between data sets."""
    ...

  def subset(self, indices: np.ndarray) -> Self:
    """The data set of the images with these indices, int `[n]`."""
    ...

  def with_labels(self, labels: np.ndarray) -> Self:
    """The same images with other labels, int32 `[N]`."""
    ...

  def sample(self, count: int) -> Self:
    """`count` images, or all if there are fewer; always the same images."""
    ...


@dataclasses.dataclass(frozen=True)
class Arrays:
  """Images of one size, in memory or mapped from a file. `arrays.convert` makes them of other arrays.

  Attributes:
    images: uint8 `[N, h, w, c]`.
    labels: int32 `[N]`, from 0 to C - 1, -1 where unknown.
    resident: whether a run keeps the images in device memory.
    image_names: names of the images, if they have any.
    class_names: names of the C classes; by default '0' to the highest label; empty without labels.
    range: the values of 16-bit or float images that became black and white; (0, 0): they had 8 bits.
    remarks: what was done to the images, a sentence each.
  """

  images: np.ndarray
  labels: np.ndarray
  resident: bool = True
  image_names: list[str] | None = None
  class_names: Sequence[str] = ()
  range: tuple[float, float] = (0.0, 0.0)
  remarks: tuple[str, ...] = ()

  def __post_init__(self):
    if self.images.ndim != 4 or self.images.dtype != np.uint8:
      raise ConfigError(
        f'images must be uint8 [N, height, width, channels], '
        f'these are {self.images.dtype} {list(self.images.shape)}'
      )
    if self.labels.shape != (len(self.images),):
      raise ConfigError(f'{len(self.images)} images, but labels of shape {list(self.labels.shape)}')
    if not len(self.class_names):
      highest = int(self.labels.max(initial=-1))
      if highest >= MAX_CLASSES:
        raise ConfigError(
          f'labels go up to {highest}: number the classes, labels = '
          'np.unique(labels, return_inverse=True)[1]'
        )
      object.__setattr__(self, 'class_names', [str(i) for i in range(highest + 1)])

  def __len__(self) -> int:
    return len(self.images)

  @property
  def labelled(self) -> bool:
    """Whether every image has a label."""
    return len(self) > 0 and bool((self.labels >= 0).all())

  @property
  def classes(self) -> int:
    """Number of classes; 0 without labels."""
    return len(self.class_names)

  def names(self) -> list[str] | None:
    """Names of the images, if they have any."""
    return self.image_names

  def fingerprint(self) -> int:
    """CRC-32 of pixels and labels."""
    return crc32(self.images, self.labels)

  def subset(self, indices: np.ndarray) -> Self:
    """The data set of the images with these indices."""
    names = self.image_names and [self.image_names[i] for i in indices]
    return dataclasses.replace(
      self, images=self.images[indices], labels=self.labels[indices], image_names=names
    )

  def with_labels(self, labels: np.ndarray) -> Self:
    """The same images with other labels, int32 `[N]`."""
    return dataclasses.replace(self, labels=labels)

  def sample(self, count: int) -> Self:
    """`count` images, or all if there are fewer; always the same images."""
    return self.subset(choose(count, len(self)))


def channels(dataset: Dataset) -> int:
  """Number of channels of the images."""
  if isinstance(dataset, Arrays):
    return dataset.images.shape[-1]
  return dataset.settings.channels  # type: ignore[attr-defined]  # a stream


def value_range(dataset: Dataset) -> tuple[float, float]:
  """The values of 16-bit or float images that become black and white; (0, 0): all images have 8 bits."""
  if isinstance(dataset, Arrays):
    return dataset.range
  return tuple(dataset.settings.range)  # type: ignore[attr-defined]  # a stream


def choose(count: int, total: int) -> np.ndarray:
  """`count` of the integers below `total`, or all of them, ascending; always the same integers."""
  return np.sort(np.random.default_rng(0).permutation(total)[:count])


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
  """A key that sorts names as people do: 1, 2, 10 and a1, a2, a10."""
  parts = re.split(r'([0-9]+)', text)
  return tuple((0, int(p), p) if p.isdecimal() else (1, 0, p) for p in parts if p)


def fits_on_device(config: ml_collections.ConfigDict, size: int) -> bool:
  """Whether images of `size` bytes are kept in device memory."""
  return config.on_device == 'yes' or (config.on_device == 'auto' and size <= ON_DEVICE)
