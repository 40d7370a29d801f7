"""Format, size and orientation of image files, from their first bytes.

For many files at a time, in numpy and without TensorFlow: no image is decoded before its size is known.
"""

import re
from typing import NamedTuple

import numpy as np

HEAD = 2048  # bytes of a file that are searched
KINDS = (
  'unknown', 'JPEG', 'PNG', 'GIF', 'BMP', 'WebP', 'TIFF', 'PNM', 'JPEG 2000', 'AVIF', 'HEIC',
)  # fmt: skip
UNKNOWN, JPEG, PNG, GIF, BMP, WEBP, TIFF, PNM, JPEG2000, AVIF, HEIC = range(11)
SUFFIXES = (
  '.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.gif', '.bmp', '.dib', '.webp', '.tif', '.tiff', '.ppm', '.pgm', '.pbm',
  '.pnm', '.pfm', '.jp2', '.j2k', '.jpx', '.avif', '.heic', '.heif',
)  # fmt: skip
MAGIC = {
  TIFF: (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+'),
  PNM: tuple(b'P' + n + space for n in (b'1', b'2', b'3', b'4', b'5', b'6', b'f', b'F')
             for space in (b' ', b'\n', b'\r', b'\t')),
  JPEG2000: (b'\0\0\0\x0cjP  ', b'\xff\x4f\xff\x51'),
}  # fmt: skip
BRANDS = {
  AVIF: (b'avif', b'avis'),
  HEIC: (b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx', b'mif1', b'msf1'),
}


MARKER = re.compile(rb'\xff+([^\x00\xff])', re.DOTALL)  # in a JPEG


class Headers(NamedTuple):
  """What the first bytes of n files say.

  Attributes:
    kind: int32 `[n]`, an index into `KINDS`.
    shape: int64 `[n, 2]`, height and width as stored, 0 where unknown.
    orientation: int32 `[n]`, from 1 to 8 as in the EXIF tag, which is read from JPEG only.
    plain: bool `[n]`, whether TensorFlow decodes the image as it is to be: 8 bits, opaque, a still image. The other
      images are for `special.read`, also to find their size.
  """

  kind: np.ndarray
  shape: np.ndarray
  orientation: np.ndarray
  plain: np.ndarray


def read(head: np.ndarray, jpeg_shape: np.ndarray) -> Headers:
  """Reads the headers of images.

  Args:
    head: uint8 `[n, HEAD]`, the first bytes of each file, padded with zeros.
    jpeg_shape: int `[n, 2]`, height and width of the JPEG images, which may not be in the first bytes.
  """
  kind, shape = np.zeros(len(head), np.int32), np.zeros((len(head), 2), np.int64)
  plain = np.zeros(len(head), bool)

  def find(number, magic, at=0):
    rows = np.flatnonzero((head[:, at : at + len(magic)] == np.frombuffer(magic, np.uint8)).all(1))
    kind[rows] = number
    return rows

  def value(rows, at, count, big=False):
    weights = 256 ** np.arange(count, dtype=np.int64)
    return head[rows, at : at + count].astype(np.int64) @ (weights[::-1] if big else weights)

  rows = find(JPEG, b'\xff\xd8\xff')
  shape[rows], plain[rows] = jpeg_shape[rows], True
  rows = find(PNG, b'\x89PNG\r\n\x1a\n')
  size = np.stack([value(rows, 20, 4, True), value(rows, 16, 4, True)], 1)
  starts = (head[rows, 8:16] == np.frombuffer(b'\0\0\0\x0dIHDR', np.uint8)).all(1)
  shape[rows] = np.where(starts[:, None], size, 0)
  # 8 bits, no alpha, and neither a transparent colour nor an orientation before the pixels.
  plain[rows] = (head[rows, 24] <= 8) & (head[rows, 25] < 4) & _contains(head[rows], b'IDAT')
  plain[rows] &= ~_contains(head[rows], b'tRNS') & ~_contains(head[rows], b'eXIf')
  plain[rows] |= ~starts  # broken
  for magic in (b'GIF87a', b'GIF89a'):
    rows = find(GIF, magic)
    shape[rows] = np.stack([value(rows, 8, 2), value(rows, 6, 2)], 1)
  rows = find(BMP, b'BM')
  height = value(rows, 22, 4)  # negative: rows from top to bottom
  size = np.stack([np.minimum(height, 2**32 - height), value(rows, 18, 4)], 1)
  old = np.stack([value(rows, 20, 2), value(rows, 18, 2)], 1)  # a header of 12 bytes
  shape[rows] = np.where(value(rows, 14, 4)[:, None] == 12, old, size)
  plain[rows] = (value(rows, 14, 4) >= 40) & (value(rows, 28, 2) == 24) & (value(rows, 30, 4) == 0)
  rows = find(WEBP, b'WEBPVP8 ', 8)  # lossy
  shape[rows] = np.stack([value(rows, 28, 2), value(rows, 26, 2)], 1) & 0x3FFF
  plain[rows] = True
  rows = find(WEBP, b'WEBPVP8L', 8)  # lossless
  bits = value(rows, 21, 4)
  shape[rows] = np.stack([(bits >> 14) & 0x3FFF, bits & 0x3FFF], 1) + 1
  plain[rows] = (bits >> 28) & 1 == 0  # no alpha
  rows = find(WEBP, b'WEBPVP8X', 8)  # extended
  shape[rows] = np.stack([value(rows, 27, 3), value(rows, 24, 3)], 1) + 1
  plain[rows] = head[rows, 20] & 0x1A == 0  # no animation, EXIF or alpha
  for number, starts in MAGIC.items():
    for magic in starts:
      find(number, magic)
  for number, brands in BRANDS.items():
    for brand in brands:
      find(number, b'ftyp' + brand, 4)
  # Files of the general brand mif1 say further on what they are.
  kind[(kind == HEIC) & _contains(head[:, :64], b'avif')] = AVIF
  orientation = np.where(kind == JPEG, _orientation(head), 1).astype(np.int32)
  return Headers(kind, shape, orientation, plain)


def scans(contents: bytes) -> int:
  """Number of scans of a JPEG, without those of a preview in its header or of what follows the image."""
  at, count = 2, 0
  while marker := MARKER.search(contents, at):
    at, code = marker.end(), marker[1][0]
    if code == 0xD9:  # the end
      break
    if 0xD0 <= code <= 0xD8 or code == 1:  # nothing belongs to them
      continue
    count += code == 0xDA
    at += int.from_bytes(contents[at : at + 2], 'big')
  return count


def _contains(head, text):
  """Whether the bytes of each row contain a text: bool `[n]`."""
  mark, last = np.frombuffer(text, np.uint8), head.shape[1] - len(text) + 1
  return np.all([head[:, i : last + i] == mark[i] for i in range(len(mark))], axis=0).any(1)


def _orientation(head):
  """The value of the EXIF tag 0x0112, type SHORT, count 1, in either byte order; 1 without the tag."""
  orientation = np.ones(len(head), np.int32)
  rows = np.flatnonzero(_contains(head, b'Exif'))
  windows = np.lib.stride_tricks.sliding_window_view(head[rows], 10, axis=1)
  for tag, at in (
    (b'\x12\x01\x03\x00\x01\x00\x00\x00', 8),
    (b'\x01\x12\x00\x03\x00\x00\x00\x01', 9),
  ):
    is_tag = (windows[..., :8] == np.frombuffer(tag, np.uint8)).all(-1)
    value = windows[np.arange(len(rows)), is_tag.argmax(1), at]
    valid = is_tag.any(1) & (value >= 1) & (value <= 8)
    orientation[rows] = np.where(valid, value, orientation[rows])
  return orientation


def shown(shape: np.ndarray, orientation: np.ndarray) -> np.ndarray:
  """Sizes `[n, 2]` as stored -> as displayed, that is, after applying the orientation `[n]`."""
  return np.where(orientation[:, None] >= 5, shape[:, ::-1], shape)


def mirrored(orientation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Whether an EXIF orientation mirrors rows and columns; orientations from 5 on also transpose, first."""
  rows = (orientation == 3) | (orientation == 4) | (orientation == 7) | (orientation == 8)
  columns = (orientation == 2) | (orientation == 3) | (orientation == 6) | (orientation == 7)
  return rows, columns


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
  """An image `[h, w, c]` as stored -> as displayed."""
  rows, columns = mirrored(np.asarray(orientation))
  image = image.swapaxes(0, 1) if orientation >= 5 else image
  return image[:: -1 if rows else 1, :: -1 if columns else 1]


def problems(kind: np.ndarray, shape: np.ndarray, max_pixels: int) -> list[str]:
  """Why each image must not be decoded, a phrase that follows the name of a file; empty if it may be.

  Args:
    kind, shape: as of `read`.
    max_pixels: larger images are refused.
  """
  reasons = []
  for k, (h, w) in zip(kind, shape):
    if k == UNKNOWN:
      reasons.append(f'is not an image of a known format ({", ".join(KINDS[1:])})')
    elif h * w > max_pixels:
      reasons.append(f'has {w:,} x {h:,} pixels, more than data.max_pixels={max_pixels:,}')
    elif h * w == 0:
      reasons.append(f'is a broken {KINDS[k]}: its header gives no size')
    else:
      reasons.append('')
  return reasons
