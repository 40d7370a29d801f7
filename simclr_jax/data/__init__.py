"""Images in, batches and augmented views out.

A source is a module with `load(config, split) -> Dataset`, where `config` is the recipe's `data` part;
`config.source` is its name.
"""

import dataclasses
import importlib

import ml_collections
import numpy as np

from simclr_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Images of one size, in memory.

  Attributes:
    images: uint8 `[N, h, w, 3]`.
    labels: int32 `[N]`, -1 where unknown.
  """

  images: np.ndarray
  labels: np.ndarray

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


def load(config: ml_collections.ConfigDict, split: str) -> Dataset:
  """`split` is 'train' or 'test'; the recipe says what its source calls it."""
  module = importlib.import_module(f'{__name__}.{config.source}')
  return module.load(config, config[f'{split}_split'])
