"""The augmentation ops that pipelines consist of.

An op is a function (key, image `[h, w, 3]`, size of the views, **arguments) -> image. Ops that
set the size of views return a crop instead, (key, height, width, size, **arguments) -> as in
`crop.py`, so that an image can be cropped where it is stored. Values are in [0, 1]; only SimCLR's
bicubic crops exceed this range a little. Ops that differ between SimCLR's code
(TensorFlow) and MoCo's (torchvision) have a prefix that says which one they follow.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from simclr_jax.data import crop, pixels
from simclr_jax.validation import Choices, Range

AREA, FACTOR, SIGMA = Range(1e-4, 1.0), Range(0.0, 10.0), Range(0.01, 20.0)
SHARE = Range(0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Definition:
  """An op as it may be used in a pipeline.

  Attributes:
    function: (key, image, size, **arguments) -> image; for one with a kernel
      (key, height, width, size, **arguments) -> crop.
    allowed: argument -> its range or choices.
    kernel: of the resizing, if the op sets the size of views: a pipeline starts with such an op, which
      takes no `p`.
    draws: whether the op uses its key.
    p: probability that the op is applied to an image, where the pipeline has none.
  """

  function: Callable[..., jax.Array]
  allowed: dict[str, Range | Choices]
  kernel: str
  draws: bool
  p: float

  @property
  def sized(self) -> bool:
    """Whether the op sets the size of views."""
    return bool(self.kernel)


def op(kernel: str = '', draws: bool = False, p: float = 1.0, **allowed: Range | Choices):
  """Makes an op of a function; see `Definition`. Files with ops of your own use this decorator, too."""

  def define(function):
    function.definition = Definition(function, allowed, kernel, draws, p)
    return function

  return define


def defined_in(names: Mapping[str, Any]) -> dict[str, Definition]:
  """The ops in a module's namespace, by name."""
  return {k: v.definition for k, v in names.items() if hasattr(v, 'definition')}


# Ops that set the size of views.


@op('bicubic', draws=True, area_min=AREA, area_max=AREA, min_object_covered=SHARE)
def simclr_crop(key, height, width, size, area_min, area_max, min_object_covered=0.1):
  """TensorFlow's random box with this share of the image's area, resized bicubically."""
  return crop.tensorflow_box(
    key, height, width, (area_min, area_max), min_object_covered=min_object_covered
  )


@op('triangle', draws=True, area_min=AREA, area_max=AREA)
def torch_crop(key, height, width, size, area_min, area_max):
  """torchvision's `RandomResizedCrop` of a Pillow image: bilinear, antialiased."""
  return crop.torchvision_box(key, height, width, (area_min, area_max))


@op('bicubic', fraction=Range(0.1, 1.0))
def center_crop(key, height, width, size, fraction=0.875):
  """SimCLR's evaluation: the central square, resized bicubically; 0.875 is CROP_PROPORTION."""
  return crop.tensorflow_center(height, width, fraction)


@op('triangle', fraction=Range(0.1, 1.0))
def torch_center_crop(key, height, width, size, fraction=0.875):
  """MoCo's evaluation: `Resize(size / fraction)`, `CenterCrop(size)`; 0.875 is 224 of 256."""
  return crop.torchvision_center(height, width, size, fraction)


@op('triangle')
def resize(key, height, width, size):
  """The whole image, its sides stretched to `size`: bilinear, antialiased."""
  return crop.whole(height, width)


# Geometry.


@op(p=0.5)
def flip(key, image, size):
  """Left and right swapped."""
  return image[:, ::-1]


@op(draws=True)
def rotate(key, image, size):
  """By 0, 90, 180 or 270 degrees, each as likely."""
  quarter = jax.random.randint(key, (), 0, 4)
  return jnp.select([quarter == i for i in range(4)], [jnp.rot90(image, i) for i in range(4)])


@op(draws=True, fraction=SHARE)
def cutout(key, image, size, fraction):
  """A black square, its side this fraction of the image's, around a uniformly drawn pixel.

  DeVries & Taylor 2017; near the border part of the square falls outside.
  """
  row, column = jax.random.randint(key, (2,), 0, size)
  return pixels.cutout(image, row, column, round(fraction * size))


# Colour.


@op(draws=True, strength=Range(0.0, 1.25), brightness=Choices('multiplicative', 'additive'))
def simclr_jitter(key, image, size, strength, brightness='multiplicative'):
  """Brightness, contrast, saturation and hue in random order, clipped to [0, 1] after each.

  At strength s the factors of the first three are uniform in [max(1 - 0.8 s, 0), 1 + 0.8 s] (an
  additive brightness in [-0.8 s, 0.8 s]), the hue turns by up to 0.2 s of the circle either way.
  """
  order_key, *keys = jax.random.split(key, 5)
  wide, low = 0.8 * strength, max(1 - 0.8 * strength, 0.0)
  ranges = [(low, 1 + wide), (low, 1 + wide), (low, 1 + wide), (-0.2 * strength, 0.2 * strength)]
  if brightness == 'additive':
    ranges[0] = (-wide, wide)
  b, c, s, h = (jax.random.uniform(k, minval=lo, maxval=hi) for k, (lo, hi) in zip(keys, ranges))
  brighten = pixels.brightness_add if brightness == 'additive' else pixels.brightness_multiply

  def step(image, op):
    # Mapped over a batch, every op runs in every place and the drawn one is kept; saturation and hue
    # share their way through HSV.
    turned = pixels.hue_and_saturation(
      image, jnp.where(op == 3, h, 0.0), jnp.where(op == 2, s, 1.0)
    )
    image = jnp.select([op == 0, op == 1], [brighten(image, b), pixels.contrast(image, c)], turned)
    return jnp.clip(image, 0.0, 1.0), None

  return jax.lax.scan(step, image, jax.random.permutation(order_key, 4))[0]


@op(draws=True, brightness=FACTOR, contrast=FACTOR, saturation=FACTOR, hue=Range(0.0, 0.5))
def torch_jitter(key, image, size, brightness, contrast, saturation, hue):
  """torchvision's `ColorJitter` of a Pillow image: the four in random order, clipped after each.

  The factor of a strength b is uniform in [max(1 - b, 0), 1 + b] and blends the image with black
  (brightness), with the mean of its grayscale (contrast) or with its grayscale (saturation). The hue
  turns by up to `hue` of the circle either way.
  """
  order_key, factor_key, hue_key = jax.random.split(key, 3)
  strengths = jnp.array([brightness, contrast, saturation])
  low = jnp.maximum(1 - strengths, 0.0)
  factors = low + jax.random.uniform(factor_key, (3,)) * (1 + strengths - low)
  turns = jax.random.uniform(hue_key, minval=-hue, maxval=hue)

  def step(image, op):
    gray = pixels.grayscale(image)
    other = jnp.select([op == 0, op == 1], [jnp.zeros_like(image), gray.mean() + 0 * gray], gray)
    blended = other + (image - other) * factors[jnp.minimum(op, 2)]
    # Strength 0 leaves the op out: turning the hue by nothing would still round it.
    turned = pixels.pillow_hue(image, turns) if hue else image
    return jnp.clip(jnp.where(op == 3, turned, blended), 0.0, 1.0), None

  return jax.lax.scan(step, image, jax.random.permutation(order_key, 4))[0]


@op()
def grayscale(key, image, size):
  """Colour drop: the luma in all three channels."""
  return pixels.grayscale(image)


@op(threshold=SHARE)
def solarize(key, image, size, threshold=0.5):
  """Values from the threshold on inverted."""
  return pixels.solarize(image, threshold)


@op()
def equalize(key, image, size):
  """Each channel's histogram made flat."""
  return pixels.equalize(image)


# Blur, noise, edges.


@op(draws=True, per=Choices('example', 'batch'))
def simclr_blur(key, image, size, per='example'):
  """Gaussian blur, sigma uniform in [0.1, 2] pixels; zero-padded, which darkens the border.

  SimCLR's kernel of a tenth of the size. With per='batch', as in its code, a view has one sigma
  throughout a batch: `augment.view` then passes the same key for every image.
  """
  sigma = jax.random.uniform(key, minval=0.1, maxval=2.0)
  return pixels.gaussian_blur(image, sigma, size // 10 // 2, 'constant')


@op(draws=True, sigma_min=SIGMA, sigma_max=SIGMA)
def torch_blur(key, image, size, sigma_min, sigma_max):
  """Gaussian blur, sigma uniform in this range of pixels; the border continues its last pixels.

  MoCo's code calls Pillow, which approximates it by box filters: on smooth images of 224 pixels the
  two differ by up to 2 of 255 levels (mean 0.4 at sigma 2), on white noise by up to 25 (mean 1).
  """
  sigma = jax.random.uniform(key, minval=sigma_min, maxval=sigma_max)
  return pixels.gaussian_blur(image, sigma, math.ceil(4 * sigma_max), 'edge')


@op(draws=True, std=SHARE)
def noise(key, image, size, std):
  """Gaussian noise, independent at every value."""
  return image + std * jax.random.normal(key, image.shape)


@op()
def sobel(key, image, size):
  """The strength of edges in each channel."""
  return pixels.sobel(image)


OPS = defined_in(dict(globals()))
