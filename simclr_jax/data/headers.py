"""Format, size and orientation of image files, from their first bytes.

For many files at a time, in numpy and without TensorFlow: no image is decoded before its size is known.
"""

import numpy as np

HEAD = 2048  # bytes of a file that are searched
KINDS = ('unknown', 'JPEG', 'PNG', 'GIF', 'BMP', 'WebP', 'BMP with a palette', 'animated WebP')
UNKNOWN, JPEG, PNG, GIF, BMP, WEBP, PALETTE_BMP, ANIMATED_WEBP = range(8)


def read(head: np.ndarray, jpeg_shape: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Kind, stored size and orientation of images.

  Args:
    head: uint8 `[n, HEAD]`, the first bytes of each file, padded with zeros.
    jpeg_shape: int `[n, 2]`, height and width of the JPEG images, which may not be in the first bytes.

  Returns:
    `kind` int32 `[n]`, an index into `KINDS`; `shape` int64 `[n, 2]`, height and width as stored, 0
    where unknown; `orientation` int32 `[n]`, from 1 to 8 as in the EXIF tag, which is read from JPEG only.
  """
  kind, shape = np.zeros(len(head), np.int32), np.zeros((len(head), 2), np.int64)

  def find(number, magic, at=0):
    rows = np.flatnonzero((head[:, at : at + len(magic)] == np.frombuffer(magic, np.uint8)).all(1))
    kind[rows] = number
    return rows

  def value(rows, at, count, big=False):
    weights = 256 ** np.arange(count, dtype=np.int64)
    return head[rows, at : at + count].astype(np.int64) @ (weights[::-1] if big else weights)

  rows = find(JPEG, b'\xff\xd8\xff')
  shape[rows] = jpeg_shape[rows]
  rows = find(PNG, b'\x89PNG\r\n\x1a\n')
  shape[rows] = np.stack([value(rows, 20, 4, True), value(rows, 16, 4, True)], 1)
  for magic in (b'GIF87a', b'GIF89a'):
    rows = find(GIF, magic)
    shape[rows] = np.stack([value(rows, 8, 2), value(rows, 6, 2)], 1)
  rows = find(BMP, b'BM')
  height = value(rows, 22, 4)  # negative: rows from top to bottom
  shape[rows] = np.stack([np.minimum(height, 2**32 - height), value(rows, 18, 4)], 1)
  ramp = np.arange(256, dtype=np.uint8)[:, None]  # the palette of gray images
  gray = (head[rows, 54 : 54 + 1024].reshape(-1, 256, 4)[..., :3] == ramp).all((1, 2))
  kind[rows[(value(rows, 28, 2) <= 8) & ~gray]] = PALETTE_BMP
  rows = find(WEBP, b'WEBPVP8 ', 8)  # lossy
  shape[rows] = np.stack([value(rows, 28, 2), value(rows, 26, 2)], 1) & 0x3FFF
  rows = find(WEBP, b'WEBPVP8L', 8)  # lossless
  bits = value(rows, 21, 4)
  shape[rows] = np.stack([(bits >> 14) & 0x3FFF, bits & 0x3FFF], 1) + 1
  rows = find(WEBP, b'WEBPVP8X', 8)  # extended
  shape[rows] = np.stack([value(rows, 27, 3), value(rows, 24, 3)], 1) + 1
  kind[rows[head[rows, 20] & 2 > 0]] = ANIMATED_WEBP
  return kind, shape, np.where(kind == JPEG, _orientation(head), 1).astype(np.int32)


def _orientation(head):
  """The value of the EXIF tag 0x0112, type SHORT, count 1, in either byte order; 1 without the tag."""
  orientation = np.ones(len(head), np.int32)
  mark = np.frombuffer(b'Exif', np.uint8)
  has_exif = np.all([head[:, i : HEAD - 4 + i] == mark[i] for i in range(4)], axis=0).any(1)
  rows = np.flatnonzero(has_exif)
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


def problems(kind: np.ndarray, shape: np.ndarray, max_pixels: int) -> list[str]:
  """Why each image must not be decoded, a phrase that follows the name of a file; empty if it may be.

  Args:
    kind, shape: as of `read`.
    max_pixels: larger images are refused.
  """
  reasons = []
  for k, (h, w) in zip(kind, shape):
    if k == UNKNOWN:
      reasons.append('is not a JPEG, PNG, WebP, BMP or GIF image')
    elif k in (PALETTE_BMP, ANIMATED_WEBP):
      # TensorFlow 2.21 reads indices of a palette as colours, and corrupts its memory on an animated WebP.
      reasons.append(
        f'is {"an" if k == ANIMATED_WEBP else "a"} {KINDS[k]}, which cannot be decoded'
      )
    elif h * w > max_pixels:
      reasons.append(f'has {w:,} x {h:,} pixels, more than data.max_pixels={max_pixels:,}')
    elif h * w == 0:
      reasons.append(f'is a broken {KINDS[k]}: its header gives no size')
    else:
      reasons.append('')
  return reasons
