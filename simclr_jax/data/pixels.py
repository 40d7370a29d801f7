"""Arithmetic on the pixels of one float image `[h, w, c]`, RGB for colours; random values are arguments.

Where TensorFlow (SimCLR's code) and Pillow or torchvision (MoCo's code) differ, the docstring names the
definition. Pillow rounds to 8 bits after every op; here only the hue is rounded, where it matters.
"""

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax.data import crop

LUMA = np.array([0.2989, 0.5870, 0.1140], np.float32)


# Colour.


def to_rgb(images: np.ndarray) -> np.ndarray:
  """Images `[..., c]` of any number of channels for showing: `[..., 3]`, the first three channels, or the first as gray."""
  return images[..., :3] if images.shape[-1] >= 3 else np.repeat(images[..., :1], 3, -1)


def brightness_multiply(image: jax.Array, factor: jax.Array) -> jax.Array:
  """Brightness of SimCLR v2 and torchvision: multiplies every value by `factor`."""
  return image * factor


def brightness_add(image: jax.Array, delta: jax.Array) -> jax.Array:
  """Brightness of SimCLR v1: adds `delta` to every value."""
  return image + delta


def contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
  """`tf.image.adjust_contrast`: multiplies differences from each channel's mean by `factor`."""
  mean = jnp.mean(image, axis=(-3, -2), keepdims=True)
  return (image - mean) * factor + mean


def _hue(image):
  """Value, chroma and hue, in sixths of a turn from -1 to 5, each `[h, w]`."""
  value = jnp.max(image, axis=-1)
  chroma = value - jnp.min(image, axis=-1)
  r, g, b = (image[..., i] for i in range(3))
  safe = jnp.where(chroma > 0, chroma, 1.0)
  hue = jnp.where(
    value == r, (g - b) / safe, jnp.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
  )
  return value, chroma, jnp.where(chroma > 0, hue, 0.0)


def _modulo(x, n):
  return x - n * jnp.floor(x / n)  # jnp.mod calls a slow library function for every value on a CPU


def _rgb(value, chroma, hue):
  """The inverse of `_hue`: the image `[h, w, 3]` of a value, chroma and hue."""
  k = _modulo(np.array([5.0, 3.0, 1.0], np.float32) + hue[..., None], 6)
  return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0)


def hue_and_saturation(image: jax.Array, delta: jax.Array, factor: jax.Array) -> jax.Array:
  """`tf.image.adjust_hue` by `delta` turns and `tf.image.adjust_saturation` by `factor`, in HSV.

  The value is unchanged; the saturation is clipped to [0, 1]. `delta` 0 and `factor` 1 change nothing.
  """
  value, chroma, hue = _hue(image)
  saturation = jnp.where(value > 0, chroma / jnp.where(value > 0, value, 1.0), 0.0)
  return _rgb(value, value * jnp.clip(saturation * factor, 0.0, 1.0), hue + 6 * delta)


def pillow_hue(image: jax.Array, turns: jax.Array) -> jax.Array:
  """torchvision's `adjust_hue` of a Pillow image: HSV in 8 bits, whose hue wraps around at 256.

  A full turn is 255 steps and not 256, so a shift that wraps around loses one step.
  """
  value, chroma, hue = _hue(jnp.round(255 * image))
  step = jnp.trunc(255 * turns)
  hue = _modulo(jnp.floor(255 * _modulo(hue / 6, 1)) + step, 256)
  saturation = jnp.floor(255 * chroma / jnp.maximum(value, 1.0)) / 255
  return jnp.round(_rgb(value, value * saturation, hue * 6 / 255)) / 255


def grayscale(image: jax.Array) -> jax.Array:
  """The luma 0.2989 R + 0.5870 G + 0.1140 B in all three channels."""
  gray = jnp.sum(image * LUMA, axis=-1, keepdims=True)
  return jnp.broadcast_to(gray, image.shape)


def solarize(image: jax.Array, threshold: float) -> jax.Array:
  """Inverts values at or above `threshold`; at 0.5, Pillow's `ImageOps.solarize(..., 128)`."""
  return jnp.where(image < threshold, image, 1 - image)


def equalize(image: jax.Array) -> jax.Array:
  """Pillow's `ImageOps.equalize`: makes the distribution of each channel's 8-bit values uniform."""
  x = jnp.round(255 * image).astype(jnp.int32).reshape(-1, image.shape[-1])
  levels = np.arange(256)
  count = jnp.sum(x[:, :, None] == levels, axis=0)  # [c, 256]
  below = jnp.cumsum(count, axis=1) - count
  brightest = jnp.sum(x == x.max(axis=0), axis=0)
  step = (len(x) - brightest[:, None]) // 255
  table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
  table = jnp.where(step > 0, table, levels)  # too few different values: unchanged
  return (jnp.take_along_axis(table.T, x, axis=0) / 255).reshape(image.shape)


# Neighbourhoods.


def gaussian_blur(image: jax.Array, sigma: jax.Array, radius: int, pad: str) -> jax.Array:
  """Gaussian blur.

  Args:
    image: `[h, w, c]`.
    sigma: standard deviation in pixels, above 0.
    radius: the kernel has 2 * radius + 1 pixels.
    pad: padding at the border: 'constant' (0), which darkens the border, or 'edge'.
  """
  offset = np.arange(-radius, radius + 1)
  kernel = jnp.exp(-(offset**2) / (2.0 * sigma**2))
  kernel = kernel / kernel.sum()

  def matrix(size):  # banded [size, size + 2 radius]: a blur is a matrix product from either side
    tap = np.arange(size + 2 * radius)[None, :] - np.arange(size)[:, None]
    inside = (tap >= 0) & (tap <= 2 * radius)
    return jnp.where(inside, kernel[np.clip(tap, 0, 2 * radius)], 0.0)

  rows, columns = matrix(image.shape[0]), matrix(image.shape[1])
  padded = jnp.pad(image, ((radius, radius), (radius, radius), (0, 0)), pad)
  return crop.apply_matrices(rows, padded, columns)


def sobel(image: jax.Array) -> jax.Array:
  """Magnitude of each channel's `tf.image.sobel_edges`, divided by 4: a step from 0 to 1 gives 1.

  The border is mirrored. SimCLR's paper does not say how it scales the filter.
  """
  x = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), 'reflect')
  smooth_rows = x[:-2] + 2 * x[1:-1] + x[2:]
  smooth_columns = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
  dx = smooth_rows[:, 2:] - smooth_rows[:, :-2]
  dy = smooth_columns[2:] - smooth_columns[:-2]
  return jnp.minimum(jnp.sqrt(dx**2 + dy**2) / 4, 1.0)


def cutout(image: jax.Array, row: jax.Array, column: jax.Array, side: int) -> jax.Array:
  """Zeroes a square around (row, column); the part outside the image is ignored."""

  def inside(centre, size):
    offset = jnp.arange(size) - centre + side // 2
    return (offset >= 0) & (offset < side)

  rows, columns = inside(row, image.shape[0]), inside(column, image.shape[1])
  return jnp.where((rows[:, None] & columns[None, :])[..., None], 0.0, image)
