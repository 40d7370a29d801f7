"""Values and channels of decoded images -> the uint8 pixels that a network sees, in numpy.

The same rules hold for files and arrays:

- 8-bit values v are kept.
- Other values x become v = 255 (x - low) / (high - low), clipped to [0, 255]; `data.range` is (low, high).
- Transparent images are put on a background b, `data.alpha`: v a + b (1 - a), where a is alpha from 0 to 1.
- The result is rounded to the nearest integer, halves upwards.
"""

from typing import NamedTuple

import ml_collections
import numpy as np

BACKGROUND = {'white': 255, 'black': 0, 'gray': 128}
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as in Pillow


class Settings(NamedTuple):
  """The fields `data.*` of the same names; `range` (0, 0): all images have 8 bits."""

  channels: int = 3
  alpha: str = 'white'
  range: tuple[float, float] = (0.0, 0.0)


def settings(config: ml_collections.ConfigDict) -> Settings:
  """The settings in the `data` part of a recipe; recipes of old runs had three channels and ignored alpha."""
  alpha, limits = config.get('alpha', 'ignore'), tuple(config.get('range', (0.0, 0.0)))
  return Settings(config.get('channels', 3), alpha, limits)


class Pixels(NamedTuple):
  """Decoded images, `[..., h, w, k]` or one image.

  Attributes:
    colour: `[h, w, k]`: gray, RGB, or k channels of any kind; of any numeric dtype.
    alpha: `[h, w]` of an unsigned integer dtype, whose highest value is opaque, or float in [0, 1]; None: opaque.
  """

  colour: np.ndarray
  alpha: np.ndarray | None = None


def check(pixels: Pixels, channels: int) -> str:
  """Why the images cannot have this number of channels, a phrase that follows their name; empty if they can."""
  found = pixels.colour.shape[-1] + (pixels.alpha is not None)
  if found == channels or (channels in (1, 3) and pixels.colour.shape[-1] in (1, 3)):
    return ''
  return f'has {found} channel{"s" * (found > 1)}, not data.channels={channels}'


def finish(pixels: Pixels, settings: Settings) -> np.ndarray:
  """The pixels that a network sees: uint8 `[..., h, w, channels]`.

  Raises:
    ValueError: the images have other channels (`check`), or NaN or infinite values.
  """
  problem = check(pixels, settings.channels)
  if problem:
    raise ValueError(problem)
  colour, alpha = pixels
  as_channel = settings.channels not in (1, 3)
  if alpha is not None and (as_channel or settings.alpha != 'ignore'):
    v, a = scaled(colour, settings.range), opacity(alpha)[..., None]
    if as_channel:
      v = np.concatenate([v, 255 * a], -1)
    else:
      v = v * a + BACKGROUND[settings.alpha] * (1 - a)
    v = _rounded(v)
  else:
    v = colour if colour.dtype == np.uint8 else _rounded(scaled(colour, settings.range))
  if v.shape[-1] == settings.channels:
    return v
  return np.repeat(v, 3, -1) if settings.channels == 3 else to_gray(v)


def _rounded(v):
  return np.floor(v + 0.5).astype(np.uint8)


def scaled(x: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
  """Values x -> v from 0 to 255, float64; limits (0, 0): those of the dtype.

  Raises:
    ValueError: NaN or infinite values.
  """
  if x.dtype == np.uint8:
    return x.astype(np.float64)
  if x.dtype.kind == 'f' and not np.isfinite(x).all():
    raise ValueError('has NaN or infinite values')
  low, high = limits
  if low == high:
    low, high = full_range(x.dtype)
  return np.clip((x.astype(np.float64) - low) * 255 / (high - low), 0, 255)


def full_range(dtype: np.dtype) -> tuple[float, float]:
  """The values of a dtype that are black and white."""
  return (0.0, 1.0) if dtype.kind in 'fb' else (0.0, float(np.iinfo(dtype).max))


def limits(low: float, high: float, dtype: np.dtype) -> tuple[float, float]:
  """The range of images with values from `low` to `high`: those, but [0, 1] for floats within it."""
  if low == high or (dtype.kind == 'f' and low >= 0 and high <= 1):
    return full_range(dtype)
  return float(low), float(high)


def describe(limits: tuple[float, float]) -> str:
  """A range as text: '0 to 4,095'."""
  return ' to '.join(f'{int(x):,}' if x == int(x) else f'{x:g}' for x in limits)


def opacity(alpha: np.ndarray) -> np.ndarray:
  """Alpha from 0 to 1, float64."""
  return alpha.astype(np.float64) / full_range(alpha.dtype)[1]


def to_gray(rgb: np.ndarray) -> np.ndarray:
  """uint8 `[..., 3]` -> the luma, uint8 `[..., 1]`."""
  return _rounded(rgb @ np.array(LUMA))[..., None]
