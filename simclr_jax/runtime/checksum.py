"""Checksums that tell data apart; they do not protect against intent."""

import zlib

import numpy as np


def crc32(*parts: np.ndarray | str) -> int:
  """CRC-32 of the bytes of arrays and texts, one after the other."""
  crc = 0
  for part in parts:
    text = isinstance(part, str)
    raw = part.encode('utf-8', 'surrogateescape') if text else np.ascontiguousarray(part)
    crc = zlib.crc32(raw, crc)
  return crc
