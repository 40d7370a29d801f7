"""Images in, batches and augmented views out.

A source is a module with `load(config, split)`, where `config` is the recipe's `data` part;
`config.source` is its name. It returns one of four kinds of data set: `Arrays` here, or the streams
`folder.Files`, `records.Records` and `records.IndexedRecords`. All have a length, `labels`, `labelled`, `classes`,
`class_names`, `fingerprint`, `only`, `with_labels` and `sample`; streams have `examples` and `once`, tf.data
of encoded images, too.
"""

import dataclasses
import importlib
import zlib
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

from simclr_jax import distributed
from simclr_jax.data import labels
from simclr_jax.errors import ConfigError

ON_DEVICE = 4 * 2**30  # bytes of images up to which a data set is kept on the devices


@dataclasses.dataclass(frozen=True)
class Arrays:
  """Images of one size, in memory or mapped from a file.

  Attributes:
    images: uint8 `[N, h, w, 3]`.
    labels: int32 `[N]`, -1 where unknown.
    resident: whether a run keeps the images on its devices.
    names: of the images, if they have any.
    class_names: of the labels, if they have any.
  """

  images: np.ndarray
  labels: np.ndarray
  resident: bool = True
  names: list[str] | None = None
  class_names: Sequence[str] = ()

  def __post_init__(self):
    if self.images.ndim != 4 or self.images.shape[-1] != 3 or self.images.dtype != np.uint8:
      raise ConfigError(
        f'images must be uint8 [N, height, width, 3], '
        f'these are {self.images.dtype} {list(self.images.shape)}'
      )
    if self.labels.shape != (len(self.images),):
      raise ConfigError(f'{len(self.images)} images, but labels of shape {list(self.labels.shape)}')

  def __len__(self) -> int:
    return len(self.images)

  @property
  def labelled(self) -> bool:
    """Whether every image has a label."""
    return len(self) > 0 and bool((self.labels >= 0).all())

  @property
  def classes(self) -> int:
    """One more than the highest label; 0 without labels."""
    return int(self.labels.max(initial=-1)) + 1

  def fingerprint(self) -> int:
    """CRC-32 that tells data sets apart: of pixels and labels."""
    return crc32(self.images, self.labels)

  def only(self, indices: np.ndarray) -> 'Arrays':
    """The data set of these images."""
    names = self.names and [self.names[i] for i in indices]
    return dataclasses.replace(
      self, images=self.images[indices], labels=self.labels[indices], names=names
    )

  def with_labels(self, labels: np.ndarray) -> 'Arrays':
    """The same images with other labels, int32 `[N]`."""
    return dataclasses.replace(self, labels=labels)

  def sample(self, count: int) -> 'Arrays':
    """`count` images, or all: always the same ones."""
    return self.only(choose(count, len(self)))


def load(config: ml_collections.ConfigDict, split: str):
  """`split` is 'train' or 'test'; the recipe says what its source calls it.

  Raises:
    ConfigError: the data is missing, broken or not what the recipe says.
  """
  module = importlib.import_module(f'{__name__}.{config.source}')
  name = config[f'{split}_split']
  if not name:
    raise ConfigError(f'data.{split}_split is empty: there are no {split} images')
  found = module.load(config, name)
  if split == 'train' and config.labels:
    found = labels.keep(found, config)
  if isinstance(found, Arrays):
    found = dataclasses.replace(found, resident=on_device(config, found.images.nbytes))
  return found


def agree(datasets: dict[str, object]) -> None:
  """Raises ConfigError, by name, where the processes of a run have not the same images."""
  if jax.process_count() > 1:
    distributed.agree({name: found and found.fingerprint() for name, found in datasets.items()})


def crc32(*parts: np.ndarray | str) -> int:
  """Of arrays and texts, one after the other."""
  found = 0
  for part in parts:
    text = isinstance(part, str)
    raw = part.encode('utf-8', 'surrogateescape') if text else np.ascontiguousarray(part)
    found = zlib.crc32(raw, found)
  return found


def choose(count: int, of: int) -> np.ndarray:
  """`count` of the numbers below `of`, or all of them, in order: always the same ones."""
  return np.sort(np.random.default_rng(0).permutation(of)[:count])


def on_device(config: ml_collections.ConfigDict, size: int) -> bool:
  """Whether images that take `size` bytes are to be kept on the devices."""
  return config.on_device == 'yes' or (config.on_device == 'auto' and size <= ON_DEVICE)
