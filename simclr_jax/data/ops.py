"""The augmentation ops of pipelines.

An op is a function (key, image `[h, w, c]`, size of the views, **arguments) -> image. An op that sets the size
of the views is a function (key, height, width, size, **arguments) -> crop, as in `crop.py`, so that the host
can crop while it decodes. Values are in [0, 1]; only SimCLR's bicubic crops exceed this range slightly. Ops
that differ between SimCLR's code (TensorFlow) and MoCo's (torchvision) have the prefix simclr_ or torch_.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from simclr_jax.data import crop, pixels
from simclr_jax.errors import ConfigError
from simclr_jax.validation import Choices, Range

AREA, FACTOR, SIGMA = Range(1e-4, 1.0), Range(0.0, 10.0), Range(0.01, 20.0)
SHARE = Range(0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Definition:
  """The definition of an op.

  Attributes:
    function: (key, image, size, **arguments) -> image; with a kernel (key, height, width, size, **arguments)
      -> crop.
    allowed: argument -> its range or choices.
    kernel: of the resizing, 'bicubic' or 'triangle', if the op sets the size of the views. A pipeline starts
      with such an op, which takes no `p`.
    draws: whether the op is random, that is, uses its key.
    p: default of the probability that the op is applied to an image.
    rgb: whether the op is defined for the colours red, green and blue only.
  """

  function: Callable[..., jax.Array]
  allowed: dict[str, Range | Choices]
  kernel: str
  draws: bool
  p: float
  rgb: bool = False

  @property
  def sized(self) -> bool:
    """Whether the op sets the size of the views."""
    return bool(self.kernel)

  @property
  def parameters(self) -> list[inspect.Parameter]:
    """The arguments that a pipeline sets."""
    return list(inspect.signature(self.function).parameters.values())[4 if self.sized else 3 :]


def op(
  kernel: str = '',
  draws: bool = False,
  p: float = 1.0,
  rgb: bool = False,
  **allowed: Range | Choices,
):
  """Decorator that makes a function an op; see `Definition`. It also serves for ops in your own files.

  Raises:
    ConfigError: the arguments of the function are not those in `allowed`.
  """

  def define(function):
    definition = Definition(function, allowed, kernel, draws, p, rgb)
    arguments = [parameter.name for parameter in definition.parameters]
    if arguments != list(allowed):
      raise ConfigError(
        f'the op {function.__name__} takes ({", ".join(arguments)}), but its decorator '
        f'has ranges or choices for ({", ".join(allowed)})'
      )
    function.definition = definition
    return function

  return define


def defined_in(names: Mapping[str, Any]) -> dict[str, Definition]:
  """The ops in a module's namespace, by name."""
  return {k: v.definition for k, v in names.items() if hasattr(v, 'definition')}


# Ops that set the size of the views.


@op('bicubic', draws=True, area_min=AREA, area_max=AREA, min_object_covered=SHARE)
def simclr_crop(key, height, width, size, area_min, area_max, min_object_covered=0.1):
  """TensorFlow's random box with this fraction of the image's area, resized bicubically."""
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
  """Rotation by 0, 90, 180 or 270 degrees with equal probability."""
  quarter = jax.random.randint(key, (), 0, 4)
  return jnp.select([quarter == i for i in range(4)], [jnp.rot90(image, i) for i in range(4)])


@op(draws=True, fraction=SHARE)
def cutout(key, image, size, fraction):
  """A black square around a uniformly drawn pixel; `fraction` is its side over the side of the image.

  DeVries & Taylor 2017; near the border a part of the square is outside the image.
  """
  row, column = jax.random.randint(key, (2,), 0, size)
  return pixels.cutout(image, row, column, round(fraction * size))


# Colour.


@op(
  draws=True, rgb=True, strength=Range(0.0, 1.25), brightness=Choices('multiplicative', 'additive')
)
def simclr_jitter(key, image, size, strength, brightness='multiplicative'):
  """Brightness, contrast, saturation and hue in random order, clipped to [0, 1] after each.

  At strength s the factors of the first three are uniform in [max(1 - 0.8 s, 0), 1 + 0.8 s] (an additive
  brightness in [-0.8 s, 0.8 s]); the hue is shifted by up to 0.2 s of a full turn in either direction.
  """
  order_key, *keys = jax.random.split(key, 5)
  wide, low = 0.8 * strength, max(1 - 0.8 * strength, 0.0)
  ranges = [(low, 1 + wide), (low, 1 + wide), (low, 1 + wide), (-0.2 * strength, 0.2 * strength)]
  if brightness == 'additive':
    ranges[0] = (-wide, wide)
  b, c, s, h = (jax.random.uniform(k, minval=lo, maxval=hi) for k, (lo, hi) in zip(keys, ranges))
  brighten = pixels.brightness_add if brightness == 'additive' else pixels.brightness_multiply

  def step(image, op):
    # Under vmap every op runs at every step, and the drawn op is selected; saturation and hue share the
    # conversion to HSV.
    turned = pixels.hue_and_saturation(
      image, jnp.where(op == 3, h, 0.0), jnp.where(op == 2, s, 1.0)
    )
    image = jnp.select([op == 0, op == 1], [brighten(image, b), pixels.contrast(image, c)], turned)
    return jnp.clip(image, 0.0, 1.0), None

  return jax.lax.scan(step, image, jax.random.permutation(order_key, 4))[0]


@op(
  draws=True, rgb=True, brightness=FACTOR, contrast=FACTOR, saturation=FACTOR, hue=Range(0.0, 0.5)
)
def torch_jitter(key, image, size, brightness, contrast, saturation, hue):
  """torchvision's `ColorJitter` of a Pillow image: the four in random order, clipped after each.

  The factor of a strength b is uniform in [max(1 - b, 0), 1 + b] and blends the image with black
  (brightness), with the mean of its grayscale (contrast) or with its grayscale (saturation). The hue is
  shifted by up to `hue` of a full turn in either direction.
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
    # At strength 0 the op is skipped: a shift by 0 would still round the hue.
    turned = pixels.pillow_hue(image, turns) if hue else image
    return jnp.clip(jnp.where(op == 3, turned, blended), 0.0, 1.0), None

  return jax.lax.scan(step, image, jax.random.permutation(order_key, 4))[0]


@op(rgb=True)
def grayscale(key, image, size):
  """The luma in all three channels."""
  return pixels.grayscale(image)


@op(threshold=SHARE)
def solarize(key, image, size, threshold=0.5):
  """Values at or above the threshold are inverted."""
  return pixels.solarize(image, threshold)


@op()
def equalize(key, image, size):
  """Histogram equalisation of each channel."""
  return pixels.equalize(image)


# Blur, noise, edges.


@op(draws=True, per=Choices('example', 'batch'))
def simclr_blur(key, image, size, per='example'):
  """Gaussian blur, sigma uniform in [0.1, 2] pixels; zero-padded, which darkens the border.

  The kernel has a tenth of the size, as SimCLR's. With per='batch', as in SimCLR's code, all images of a
  batch have the same sigma: `augment.view` passes them the same key.
  """
  sigma = jax.random.uniform(key, minval=0.1, maxval=2.0)
  return pixels.gaussian_blur(image, sigma, size // 10 // 2, 'constant')


@op(draws=True, sigma_min=SIGMA, sigma_max=SIGMA)
def torch_blur(key, image, size, sigma_min, sigma_max):
  """Gaussian blur, sigma uniform in this range of pixels; the border is padded with its last pixels.

  MoCo's code calls Pillow, which approximates the blur by box filters: on smooth images of 224 pixels the
  difference is up to 2 of 255 levels (mean 0.4 at sigma 2), on white noise up to 25 (mean 1).
  """
  sigma = jax.random.uniform(key, minval=sigma_min, maxval=sigma_max)
  return pixels.gaussian_blur(image, sigma, math.ceil(4 * sigma_max), 'edge')


@op(draws=True, std=SHARE)
def noise(key, image, size, std):
  """Independent Gaussian noise."""
  return image + std * jax.random.normal(key, image.shape)


@op()
def sobel(key, image, size):
  """The magnitude of the Sobel gradient of each channel."""
  return pixels.sobel(image)


OPS = defined_in(dict(globals()))
