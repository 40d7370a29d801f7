"""The bundled data set: scikit-learn's 1,797 scans of handwritten digits, placed on a canvas.

The scans are 8x8 and centred, which makes raw pixels good features. So each scan is enlarged to 16-28 pixels
and put at a random place on a dark 32x32 canvas in a bright random tint: two placements of one scan then have
few pixels in common.
"""

import importlib.util
import pathlib

import ml_collections
import numpy as np
from scipy import ndimage

from simclr_jax.data.dataset import Arrays
from simclr_jax.errors import ConfigError

CANVAS = 32
SCANS = {'train': slice(0, 1500), 'test': slice(1500, None)}  # after shuffling
PLACEMENTS = 4  # images per scan


def load(config: ml_collections.ConfigDict, split: str) -> Arrays:
  """6,000 training images of 1,500 scans, or 1,188 test images of the other 297 scans; always the same."""
  del config
  if split not in SCANS:
    raise ConfigError(f'the digits have the splits train and test, not {split!r}')
  scans, labels = _scans()
  chosen = np.random.default_rng(0).permutation(len(scans))[SCANS[split]]
  rng = np.random.default_rng([1, split == 'test'])
  scans = np.repeat(scans[chosen].reshape(-1, 8, 8) / 16, PLACEMENTS, axis=0)
  images = np.stack([_place(scan, rng) for scan in scans])
  return Arrays(images, np.repeat(labels[chosen], PLACEMENTS).astype(np.int32))


def _scans():
  """`sklearn.datasets.load_digits`, from the same file, without the import of scikit-learn, which takes a second."""
  spec = importlib.util.find_spec('sklearn')
  assert spec and spec.origin  # a dependency
  table = np.loadtxt(
    pathlib.Path(spec.origin).parent / 'datasets/data/digits.csv.gz', delimiter=','
  )
  return table[:, :-1], table[:, -1].astype(int)


def _place(scan: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """One 8x8 scan in [0, 1] -> uint8 `[32, 32, 3]`."""
  size = rng.integers(16, 29)
  ink = np.zeros((CANVAS, CANVAS))
  top, left = rng.integers(0, CANVAS - size + 1, 2)
  enlarged = ndimage.zoom(scan, size / 8, order=1, grid_mode=True, mode='nearest')
  ink[top : top + size, left : left + size] = np.clip(enlarged, 0, 1)
  bright, dark = rng.uniform(0.5, 1.0, 3), rng.uniform(0.0, 0.2)
  image = dark + ink[..., None] * (bright - dark)
  return np.round(255 * image).astype(np.uint8)
