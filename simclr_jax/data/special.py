"""Images that need more than TensorFlow's decoders: through Pillow or tifffile, one at a time in Python.

These are the formats that TensorFlow cannot read (TIFF, PNM, JPEG 2000, AVIF, HEIC, animated WebP, most BMP), GIF,
whose header and frame may disagree, and all images with alpha or with more than 8 bits. They are slower.
"""

import contextlib
import functools
import importlib
import importlib.util
import io
import logging
import lzma
import math
import re
import threading
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps

from simclr_jax.data import headers, values
from simclr_jax.data.stream import tf
from simclr_jax.data.values import Pixels, Settings

FORMATS = {  # in Pillow
  headers.JPEG: ('JPEG', 'MPO'),
  headers.PNG: ('PNG',),
  headers.GIF: ('GIF',),
  headers.BMP: ('BMP',),
  headers.WEBP: ('WEBP',),
  headers.TIFF: ('TIFF',),
  headers.PNM: ('PPM',),
  headers.JPEG2000: ('JPEG2000',),
  headers.AVIF: ('AVIF',),
  headers.HEIC: ('HEIF',),
}
HEADER = 2**16  # most bytes before the values of a PNM, which Pillow reads one by one
SPACE = rb'(?:\s|#[^\r\n]*)+'  # white space and comments
SIZE = SPACE + rb'\d+' + SPACE + rb'\d+'
PNM_HEADER = re.compile(
  rb'(P[14]'
  + SIZE
  + rb'|P[2356fF]'
  + SIZE
  + SPACE
  + rb'[-+.\de]+)\s'  # most have the largest value
)
DECOMPRESSORS: dict[
  int, Callable[[], Any]
] = {  # of the compressions of TIFF that are not limited by the size of what they give
  8: zlib.decompressobj,
  32946: zlib.decompressobj,
  34925: functools.partial(lzma.LZMADecompressor, memlimit=2**28),
}
_limit_lock = threading.Lock()


class Unreadable(Exception):
  """An image cannot be decoded; the message is a phrase that follows its name."""


class Header(NamedTuple):
  """Size and bits of an image.

  Attributes:
    height, width: as displayed.
    deep: whether it has more than 8 bits, so that `data.range` applies.
  """

  height: int
  width: int
  deep: bool


class Image(NamedTuple):
  """A decoded image.

  Attributes:
    pixels: as the network sees it, uint8 `[h, w, channels]`.
    transparent: whether a pixel is not opaque.
    hides: whether the image became one colour although its colours or its alpha channel differ.
    clipped: number of values outside `data.range`.
  """

  pixels: np.ndarray
  transparent: bool
  hides: bool
  clipped: int


def header(contents: bytes, kind: int, longest: int) -> Header:
  """Reads the header of an image of a kind of `headers.KINDS`; `longest`: most bytes of its decoded values.

  Raises:
    Unreadable: the header is broken, the values take more bytes, or a package that can read the format is missing.
  """
  with _phrases(kind):
    if kind == headers.PNG and contents[24:25] == b'\x10':
      width, height = (int.from_bytes(contents[at : at + 4], 'big') for at in (16, 20))
      return Header(height, width, True)
    if kind == headers.PNM and not PNM_HEADER.match(contents[:HEADER]):
      raise Unreadable(f'is a broken PNM: it has no size in its first {HEADER:,} bytes')
    page = _tiff_page(contents, longest=longest) if kind == headers.TIFF else None
    if page is not None:
      shape = page.imagelength, page.imagewidth
      turned = _tiff_orientation(page) >= 5
      return Header(*(shape[::-1] if turned else shape), page.dtype.itemsize > 1)
    with _open(contents, kind) as image:
      deep = image.mode.startswith(('I', 'F'))
      turned = image.getexif().get(0x0112, 1) >= 5 and kind != headers.TIFF  # Pillow turns TIFF
      return Header(*(image.size if turned else image.size[::-1]), deep)


def read(contents: bytes, kind: int, settings: Settings) -> Image:
  """Decodes an image of a kind of `headers.KINDS`.

  Raises:
    Unreadable: the image is broken, has other channels, or has NaN or infinite values.
  """
  pixels = decode(contents, kind, settings.channels)
  with _phrases(kind):
    try:
      shown = values.finish(pixels, settings)
    except ValueError as error:
      raise Unreadable(str(error)) from None
    colour, alpha = pixels
    transparent = hides = False
    if alpha is not None:
      transparent = bool((alpha != values.full_range(alpha.dtype)[1]).any())
      hides = transparent and _constant(shown) and not (_constant(colour) and _constant(alpha))
    clipped = 0
    if colour.dtype != np.uint8 and any(settings.range):
      low, high = settings.range
      clipped = int(((colour < low) | (colour > high)).sum())
    return Image(shown, transparent, hides, clipped)


def decode(contents: bytes, kind: int, channels: int) -> Pixels:
  """The first frame or page of an image, as displayed; with `channels` of a TIFF, one page for each.

  Raises:
    Unreadable: the image is broken.
  """
  with _phrases(kind):
    if kind == headers.PNG and contents[24:25] == b'\x10':  # Pillow reduces colours to 8 bits
      return _deep_png(contents)
    page = _tiff_page(contents, channels) if kind == headers.TIFF else None
    if page is not None:
      return _tiff(page, channels, contents)
    with _open(contents, kind) as image:
      return _pillow(image)


def _constant(image: np.ndarray) -> bool:
  """Whether all pixels of `[h, w, ...]` are equal."""
  return bool((image == image[:1, :1]).all())


class _phrases:
  """Turns whatever a decoder raises into `Unreadable`."""

  def __init__(self, kind):
    self._kind = kind

  def __enter__(self):
    return self

  def __exit__(self, error_type, error, traceback):
    if error is None or isinstance(error, Unreadable) or not isinstance(error, Exception):
      return
    reason = (str(error).strip().splitlines() or [error_type.__name__])[0]
    raise Unreadable(f'is a broken {headers.KINDS[self._kind]}: {reason}') from None


# Pillow.


def _open(contents, kind) -> PIL.Image.Image:
  """The image in Pillow, whose own limit on the size does not apply: `data.max_pixels` does."""
  if kind == headers.HEIC:
    _register_heif()
  with _without_limit():
    try:
      return PIL.Image.open(io.BytesIO(contents), formats=FORMATS[kind])
    except (PIL.UnidentifiedImageError, KeyError):  # KeyError: this Pillow lacks the format
      if kind in (headers.AVIF, headers.JPEG2000):
        raise Unreadable(
          f'is {"an AVIF" if kind == headers.AVIF else "a JPEG 2000"} image, which this Pillow cannot read: '
          'pip install --upgrade pillow'
        ) from None
      hint = ''
      if kind == headers.TIFF and importlib.util.find_spec('tifffile') is None:
        hint = ', but tifffile may: pip install tifffile'
      raise Unreadable(
        f'is a broken {headers.KINDS[kind]}: Pillow cannot read its header{hint}'
      ) from None


@contextlib.contextmanager
def _without_limit():
  """Lifts Pillow's own limit, which is one for the whole process; one image at a time."""
  with _limit_lock:
    limit, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None
    try:
      yield
    finally:
      PIL.Image.MAX_IMAGE_PIXELS = limit


def _load(image):
  """Decodes the pixels; `data.max_pixels` was checked before."""
  large = image.width * image.height > (PIL.Image.MAX_IMAGE_PIXELS or 0)
  with _without_limit() if large else contextlib.nullcontext():
    image.load()


@functools.cache
def _register_heif():
  try:
    importlib.import_module('pillow_heif').register_heif_opener()
  except ImportError:
    raise Unreadable('is a HEIC image: pip install pillow-heif, or convert it to JPEG') from None


def _pillow(image) -> Pixels:
  _load(image)  # turns a TIFF
  PIL.ImageOps.exif_transpose(image, in_place=True)  # a copy would take much memory
  if image.mode.startswith(('I', 'F')):
    return Pixels(np.asarray(image)[..., None])
  if image.has_transparency_data:
    gray = image.mode in ('L', 'LA', 'La')
    rgba = np.asarray(image if image.mode == 'RGBA' else image.convert('RGBA'))
    return Pixels(rgba[..., : 1 if gray else 3], rgba[..., 3])
  gray = image.mode in ('1', 'L')
  mode = 'L' if gray else 'RGB'
  x = np.asarray(image if image.mode == mode else image.convert(mode))
  return Pixels(x[..., None] if gray else x)


# What Pillow reduces to 8 bits or 3 channels.


def _deep_png(contents) -> Pixels:
  transparent_colour = contents[25] in (0, 2) and b'tRNS' in contents[: contents.find(b'IDAT')]
  count = {0: 1, 2: 3, 4: 2, 6: 4}[contents[25]] + transparent_colour
  x = tf.io.decode_png(contents, count, tf.uint16).numpy()
  return Pixels(x[..., :-1], x[..., -1]) if count in (2, 4) else Pixels(x)


def _tiff_page(contents, channels=None, longest=None) -> Any:
  """The first page in tifffile, if Pillow reduces it to 8 bits or 3 channels or cannot read it; otherwise None."""
  try:
    tifffile = importlib.import_module('tifffile')
  except ImportError:
    return None
  logging.getLogger('tifffile').disabled = True  # what is wrong is said here
  pages = tifffile.TiffFile(io.BytesIO(contents)).pages
  page = pages[0]
  size = max(page.size, _part_size(page)) * page.dtype.itemsize
  if longest is not None and size > longest:
    raise Unreadable(f'takes {size:,} bytes of memory, more than {longest:,}')
  count, bits, dtype = page.samplesperpixel, page.bitspersample, page.dtype
  if channels and channels not in (1, 3) and count == 1 and len(pages) == channels:
    return pages[:]  # a page for each channel
  if count == 1:
    simple = dtype in (bool, np.uint8, np.uint16, np.int16, np.float32)
  else:
    simple = bits <= 8 and count <= 4 and channels in (None, 1, 3)
  return None if simple else page


def _part_size(page) -> int:
  """Number of values in a tile or strip of a TIFF, which is decompressed as a whole."""
  sides = (
    page.chunks if page.is_tiled else (min(page.chunks[0], page.imagelength), *page.chunks[1:])
  )
  return math.prod(sides)


def _check_parts(page, contents):
  """Raises Unreadable if a compressed part of a TIFF has far more values than its header says."""
  if page.compression not in DECOMPRESSORS:
    return
  limit = 2 * _part_size(page) * page.dtype.itemsize
  for start, count in zip(page.dataoffsets, page.databytecounts):
    part = DECOMPRESSORS[page.compression]().decompress(contents[start : start + count], limit + 1)
    if len(part) > limit:
      raise Unreadable('is a broken TIFF: it has more values than its header says')


def _tiff(page, channels, contents) -> Pixels:
  first = page[0] if isinstance(page, list) else page
  for one in page if isinstance(page, list) else [page]:
    if one.shape != first.shape or one.chunks != first.chunks:
      raise Unreadable('is a TIFF whose pages have different sizes')
    _check_parts(one, contents)
  if isinstance(page, list):
    x = np.stack([p.asarray() for p in page], -1)
  else:
    x = page.asarray()
    x = np.moveaxis(x, 0, -1) if page.axes == 'SYX' else x.reshape(*x.shape[:2], -1)
  if first.photometric == 0 and x.dtype.kind == 'u':  # white is zero
    x = np.iinfo(x.dtype).max - x
  x = headers.turned(x, _tiff_orientation(first))
  extra = first.extrasamples[0] if len(first.extrasamples) == 1 else 0
  if extra not in (1, 2):
    drop = extra == 0 and len(first.extrasamples) == 1 and x.shape[-1] == 4 and channels in (1, 3)
    return Pixels(x[..., :3] if drop else x)
  colour, alpha = x[..., :-1], x[..., -1]
  if extra == 1:  # colours are multiplied by alpha
    opacity = values.opacity(alpha)[..., None]
    colour = np.where(opacity > 0, colour / np.where(opacity > 0, opacity, 1), 0).astype(x.dtype)
  return Pixels(colour, alpha)


def _tiff_orientation(page) -> int:
  tag = page.tags.get(0x0112)
  return int(tag.value) if tag is not None and 1 <= tag.value <= 8 else 1
