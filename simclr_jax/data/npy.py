"""Reads .npy and .npz files that others may have written: sizes are checked before memory is taken for them."""

import os
import pathlib
import zipfile
import zlib
from typing import Any, BinaryIO, Self

import numpy as np

from simclr_jax.errors import ConfigError
from simclr_jax.runtime import files

MEMBERS = 10_000  # most arrays of an npz file


def load(path: pathlib.Path, mmap: bool = False) -> np.ndarray:
  """The array in a .npy file; `mmap`: it is read from the disk when it is used.

  Raises:
    ConfigError: the file is missing, damaged, shorter than it says, or has Python objects; one sentence.
  """
  with _sentences(path), _open(path) as file:
    size = os.fstat(file.fileno()).st_size
    shape, fortran, dtype = _header(file, size)
    if mmap and 0 not in shape:
      return np.memmap(path, dtype, 'r', file.tell(), shape, 'F' if fortran else 'C')
    return _read(file, shape, fortran, dtype)


class Npz:
  """The arrays in a .npz file, by name, each read when it is asked for. A context manager.

  Attributes:
    files: names of the arrays.
  """

  def __init__(self, path: pathlib.Path):
    """Errors as for `load`."""
    self._path = path
    with _sentences(path):
      file = _open(path)
      try:
        self._zip = zipfile.ZipFile(file)
      except BaseException:
        file.close()
        raise
      self._file = file
      members = [m for m in self._zip.infolist() if m.filename.endswith('.npy')]
      if len(members) > MEMBERS:
        raise ConfigError(f'{path} has {len(members):,} arrays, more than {MEMBERS:,}')
      self._members = {m.filename.removesuffix('.npy'): m for m in members}
    self.files = list(self._members)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error) -> None:
    self._zip.close()
    self._file.close()

  def __getitem__(self, name: str) -> np.ndarray:
    """An array. Errors as for `load`; also if it does not fit into memory."""
    member = self._members[name]
    with _sentences(f'{self._path}, array {name!r}'):
      if member.flag_bits & 1:
        raise ConfigError(f'{self._path} is encrypted: save the arrays without a password')
      free = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_AVPHYS_PAGES')
      if member.file_size > free:
        raise ConfigError(
          f'{self._path}: the array {name!r} needs {member.file_size / 2**30:,.1f} GiB of memory, and '
          f'{free / 2**30:,.1f} GiB are free'
        )
      with self._zip.open(member) as stream:
        shape, fortran, dtype = _header(stream, member.file_size)  # type: ignore[arg-type]
        array = _read(stream, shape, fortran, dtype)  # type: ignore[arg-type]
        if stream.read(1):  # also compares the checksum
          raise ValueError('there are bytes after the array')
      return array


def _open(path) -> BinaryIO:
  try:
    return files.open_to_read(path)
  except FileNotFoundError:
    raise ConfigError(f'{path} does not exist') from None


def _header(file: BinaryIO, size: int) -> tuple[tuple[int, ...], bool, np.dtype]:
  """Shape, order (whether Fortran's) and dtype of the array that follows in a file of `size` bytes."""
  version = np.lib.format.read_magic(file)
  readers = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }
  if version not in readers:
    raise ValueError(f'version {version} of the format is unknown')
  shape, fortran, dtype = readers[version](file)
  if dtype.hasobject:
    raise ValueError('Object arrays are not read')
  if dtype.names:
    raise ValueError(
      f'it has records ({", ".join(map(str, dtype.names[:5]))}) and no plain numbers'
    )
  if any(n < 0 for n in shape):
    raise ValueError(f'its shape is {shape}')
  needed = dtype.itemsize
  for n in shape:
    needed *= n
  if needed > size - file.tell():
    raise ValueError(f'it ends before the last of {needed:,} bytes')
  return shape, fortran, dtype


def _read(file: BinaryIO, shape, fortran, dtype) -> np.ndarray:
  """The array of a header, which follows in a file."""
  array = np.empty(shape[::-1] if fortran else shape, dtype)
  flat: Any = array.reshape(-1).view(np.uint8) if array.nbytes else b''
  view = memoryview(flat)
  done = 0
  while done < len(view):
    part = file.read(min(len(view) - done, 2**24))
    if not part:
      raise ValueError(f'it ends before the last of {len(view):,} bytes')
    view[done : done + len(part)] = part
    done += len(part)
  return array.T if fortran else array


class _sentences:
  """Turns whatever numpy and zipfile raise on damaged files into a ConfigError."""

  def __init__(self, where):
    self._where = where

  def __enter__(self):
    return self

  def __exit__(self, error_type, error, traceback):
    if not isinstance(error, Exception) or isinstance(error, ConfigError):
      return
    if 'Object arrays' in str(error):
      raise ConfigError(
        f'{self._where} cannot be read: it has an object array, such as images of several sizes: save images of one '
        'size with np.stack(images), or as files in a folder; labels as labels.astype(str)'
      ) from None
    if isinstance(error, (zipfile.BadZipFile, zlib.error)):
      reason = f'it is damaged or no zip file ({error})'
    else:
      reason = (str(error).splitlines() or [error_type.__name__])[0]
    raise ConfigError(f'{self._where} cannot be read as plain arrays: {reason[:200]}') from None
