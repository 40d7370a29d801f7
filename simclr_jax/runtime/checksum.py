"""Checksums that detect changed data; they are not cryptographic."""

import zlib

import numpy as np


def crc32(*parts: np.ndarray | str) -> int:
  """The CRC-32 checksum of the concatenated bytes of arrays and texts."""
  crc = 0
  for part in parts:
    if isinstance(part, str):
      crc = zlib.crc32(part.encode('utf-8', 'surrogateescape'), crc)
    else:
      # The stubs of numpy declare the buffer protocol for Python >= 3.12 only.
      crc = zlib.crc32(np.ascontiguousarray(part), crc)  # type: ignore[arg-type]
  return crc
