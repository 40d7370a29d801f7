"""Reading .npy and .npz files that others may have written."""

import io
import zipfile

import numpy as np
import pytest

from simclr_jax.data import npy
from simclr_jax.errors import ConfigError

ARRAYS = [
  np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.zeros((0, 3)),
  np.array(['a', 'bcd', '猫']), np.array(3), np.array([True, False]), np.arange(3, dtype='>i4'),
]  # fmt: skip


@pytest.mark.parametrize('array', ARRAYS, ids=range(len(ARRAYS)))
def test_arrays_are_read_as_numpy_reads_them(array, tmp_path):
  """Breaks if an array is read differently from numpy's own reader."""
  np.save(tmp_path / 'a.npy', array)
  np.savez(tmp_path / 'a.npz', x=array)
  np.savez_compressed(tmp_path / 'b.npz', x=array)
  found = [npy.load(tmp_path / 'a.npy'), npy.load(tmp_path / 'a.npy', mmap=True)]
  for name in ('a.npz', 'b.npz'):
    with npy.Npz(tmp_path / name) as file:
      assert file.files == ['x']
      found.append(file['x'])
  for other in found:
    np.testing.assert_array_equal(other, array)
    assert other.dtype == array.dtype and other.shape == array.shape


def header(shape, dtype='|u1'):
  """The bytes of a .npy file without its array."""
  file = io.BytesIO()
  np.lib.format.write_array_header_1_0(
    file, {'descr': dtype, 'fortran_order': False, 'shape': shape}
  )
  return file.getvalue()


def npz(content, **options):
  """The bytes of a .npz file with one array."""
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w', **options) as archive:
    archive.writestr('images.npy', content)
  return file.getvalue()


def saved(array, **options):
  """The bytes of a .npy file."""
  file = io.BytesIO()
  np.save(file, array, **options)
  return file.getvalue()


BAD = {
  'huge': header((10**15,)), 'overflow': header((2**62, 2**62)), 'negative': header((-1, 4)),
  'unterminated': b"\x93NUMPY\x01\x00\x76\x00{'descr': '<i8'B_)" + b' ' * 100, 'empty': b'', 'text': b'hello',
  'version': b'\x93NUMPY\x09\x00' + b' ' * 100, 'truncated': saved(np.arange(100))[:-8],
  'objects': saved(np.array([{}, 'a'], object), allow_pickle=True),
  'records': saved(np.zeros(3, [('a', 'u1'), ('b', 'f4')])),
  'dtype': header((1,), '|Q9'), 'nested': header((1,)).replace(b'(1,)', b'(' * 40 + b')' * 40)[:100],
}  # fmt: skip


@pytest.mark.parametrize('kind', BAD)
def test_damaged_arrays_are_one_sentence(kind, tmp_path):
  """Breaks if a damaged or hostile array takes memory, is unpickled, or is a traceback."""
  (tmp_path / 'a.npy').write_bytes(BAD[kind])
  for mmap in (False, True):
    with pytest.raises(ConfigError, match='a.npy cannot be read') as error:
      npy.load(tmp_path / 'a.npy', mmap)
    assert '\n' not in str(error.value) and len(str(error.value)) < 500
  (tmp_path / 'a.npz').write_bytes(npz(BAD[kind]))
  with (
    npy.Npz(tmp_path / 'a.npz') as file,
    pytest.raises(ConfigError, match="array 'images' cannot"),
  ):
    file['images']


def test_damaged_npz_files_are_one_sentence(tmp_path):
  """Breaks if a damaged, foreign or encrypted archive is a traceback."""
  path = tmp_path / 'a.npz'
  good = npz(saved(np.arange(1000)))
  flipped = bytearray(good)
  flipped[500] ^= 1
  encrypted = bytearray(good)
  for signature, at in ((b'PK\x03\x04', 6), (b'PK\x01\x02', 8)):
    encrypted[good.find(signature) + at] |= 1
  for content in (
    b'',
    b'PK',
    good[:-30],
    bytes(flipped),
    bytes(encrypted),
    npz(saved(np.arange(3)) + b'more'),
  ):
    path.write_bytes(content)
    with pytest.raises(ConfigError, match='a.npz'), npy.Npz(path) as file:
      file['images']
  with pytest.raises(ConfigError, match='does not exist'):
    npy.Npz(tmp_path / 'b.npz')


def test_arrays_beyond_the_memory_are_refused(tmp_path, monkeypatch):
  """Breaks if an archive that unpacks to more than the memory is unpacked."""
  path = tmp_path / 'a.npz'
  path.write_bytes(npz(saved(np.zeros(2**24, np.uint8)), compression=zipfile.ZIP_DEFLATED))
  monkeypatch.setattr('os.sysconf', lambda name: 2**10)  # 1 MiB
  with npy.Npz(path) as file, pytest.raises(ConfigError, match='of memory, and'):
    file['images']
