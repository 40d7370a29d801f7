"""Reads files of `torch.save` and safetensors, and writes the former, without PyTorch.

A file of `torch.save` is a pickle that describes containers, numbers and tensors, and the bytes of their storages: in a
zip archive, or before PyTorch 1.6 one after the other ('legacy'). A pickle is a program that may call any function of
Python. Here nothing of it is executed: the instructions that build containers, numbers and tensors are interpreted,
every other one is refused.
"""

import dataclasses
import io
import json
import math
import mmap
import pathlib
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import ml_dtypes
import numpy as np
import safetensors

from simclr_jax.errors import ConfigError
from simclr_jax.runtime import files
from simclr_jax.runtime.text import printable

HEADER = 100_000_000  # bytes of the header of safetensors, as in the library
PICKLE = 64 * 2**20  # bytes of the pickle of an archive
INSTRUCTIONS = 5_000_000  # of a pickle
VALUES = 1_000_000  # of a file, each as often as it is named
DEPTH = 100  # of containers in containers
MEMBERS = 200_000  # of an archive
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of a legacy file

DTYPES = {
  'float64': 'f8', 'float32': 'f4', 'float16': 'f2', 'bfloat16': ml_dtypes.bfloat16, 'complex64': 'c8', 'complex128': 'c16',
  'int64': 'i8', 'int32': 'i4', 'int16': 'i2', 'int8': 'i1', 'uint8': 'u1', 'bool': '?', 'uint16': 'u2', 'uint32': 'u4',
  'uint64': 'u8', 'float8_e4m3fn': ml_dtypes.float8_e4m3fn, 'float8_e5m2': ml_dtypes.float8_e5m2,
}  # fmt: skip
STORAGES = {
  'Double': 'float64', 'Float': 'float32', 'Half': 'float16', 'BFloat16': 'bfloat16', 'ComplexFloat': 'complex64',
  'ComplexDouble': 'complex128', 'Long': 'int64', 'Int': 'int32', 'Short': 'int16', 'Char': 'int8', 'Byte': 'uint8',
  'Bool': 'bool',
}  # fmt: skip
SAFETENSORS = {
  'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16', 'I64': 'int64', 'I32': 'int32', 'I16': 'int16',
  'I8': 'int8', 'U8': 'uint8', 'U16': 'uint16', 'U32': 'uint32', 'U64': 'uint64', 'BOOL': 'bool',
  'F8_E4M3': 'float8_e4m3fn', 'F8_E5M2': 'float8_e5m2',
}  # fmt: skip
KINDS = {  # the first bytes of other files
  b'version https://git-lfs': 'a pointer of Git LFS, not the file itself: fetch the file with git lfs pull',
  b'<': 'a page of HTML or XML, not weights: download the file itself',
  b'\x89HDF': 'a file of HDF5 (Keras), not of PyTorch',
  b'\x1f\x8b': 'compressed with gzip: decompress the file first',
}  # fmt: skip
SAFE = (
  'if you trust where the file comes from, save the dict of its tensors as safetensors: '
  "`found = torch.load(FILE, map_location='cpu', weights_only=False)`, then "
  "`safetensors.torch.save_file(TENSORS, 'weights.safetensors')`, where TENSORS is the part of `found` with the "
  'tensors, or found.state_dict() of a module'
)
PATHS = ('Path', 'PosixPath', 'WindowsPath', 'PurePath', 'PurePosixPath', 'PureWindowsPath')
DAMAGES = (
  ValueError, TypeError, LookupError, AttributeError, EOFError, OverflowError, MemoryError, RecursionError, NotImplementedError,
  struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


class _Refused(Exception):
  """What a file contains that is not read, and how to save it otherwise: two parts of a sentence."""

  def __init__(self, what: str, instead: str = SAFE):
    super().__init__(what)
    self.instead = instead


@dataclasses.dataclass(frozen=True)
class _Function:
  """A function that a pickle calls; `call` is ours."""

  name: str
  call: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class _Storage:
  """A storage: its key in the file and its number of values."""

  key: str
  dtype: np.dtype
  size: int

  @property
  def nbytes(self) -> int:
    return self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class _View:
  """A tensor: a view of a storage. Offset and strides are numbers of values of `dtype`."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def check(self) -> None:
    """Raises ValueError if the view is not inside its storage."""
    numbers = (self.offset, *self.shape, *self.strides)
    if len(self.shape) != len(self.strides) or len(self.shape) > 32:
      raise ValueError('a tensor has another number of strides than of dimensions')
    if any(type(n) is not int or n < 0 for n in numbers):
      raise ValueError('a tensor has a shape, an offset or strides that are no numbers or negative')
    last = self.offset + sum(
      (n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)
    )
    if 0 not in self.shape and (last + 1) * self.dtype.itemsize > self.storage.nbytes:
      raise ValueError(
        f'a tensor of shape {self.shape[:8]} reaches beyond its {self.storage.nbytes:,} bytes'
      )


class _Numpy:
  """An array or a scalar of numpy, or their dtype, whose values follow."""

  def __init__(self, code: str = ''):
    self.code, self.value = code, np.zeros(0)

  def build(self, state: tuple) -> None:
    """Sets the state, which for a dtype begins with (version, byte order), for an array is (version, shape, ...)."""
    if self.code:
      if state[1] not in ('<', '|'):
        raise ValueError('numbers of numpy are not little-endian')
      return
    _, shape, dtype, fortran, data = state
    values = np.frombuffer(_bytes(data), _of_numpy(dtype))
    self.value = values.reshape(shape, order='F' if fortran else 'C')


def read(path: pathlib.Path) -> Any:
  """The object in a file of `torch.save`, in the zip format or the legacy format; nothing is executed.

  Args:
    path: a local file, usually named `.pth`, `.pth.tar`, `.pt`, `.ckpt` or `.bin`.

  Returns:
    Nested dicts, lists and tuples of numbers, strings, None, and read-only numpy arrays instead of tensors, with
    `ml_dtypes.bfloat16` where numpy has no such dtype. Devices and dtypes are strings.

  Raises:
    ConfigError: the file is damaged, of another kind, or contains other objects; one sentence.
  """
  try:
    with open_checked(path) as file:
      start = file.read(4)
      file.seek(0)
      if start.startswith(b'PK'):
        return _read_zip(file)
      if start.startswith(b'\x80'):
        return _read_legacy(file)
      raise ValueError(f'it begins with {start!r} instead of a pickle or a zip archive')
  except _Refused as error:
    raise ConfigError(f'{path} contains {printable(error)[:200]}: {error.instead}') from None
  except DAMAGES as error:
    reason = printable(error)[:200] or type(error).__name__
    raise ConfigError(f'{path} is damaged or no file of torch.save: {reason}') from None
  except OSError as error:
    raise ConfigError(f'{path} cannot be read: {error.strerror or error}') from None


def open_checked(path: pathlib.Path) -> io.BufferedReader:
  """Opens a file of weights.

  Raises:
    ConfigError: the file does not exist, is empty or of another kind, such as a page of HTML; one sentence.
  """
  try:
    file = files.open_to_read(path)
  except FileNotFoundError:
    raise ConfigError(f'{path} does not exist') from None
  start = file.read(512)
  file.seek(0)
  text = start.lstrip(b'\xef\xbb\xbf \r\n\t')
  kinds = [kind for magic, kind in KINDS.items() if text.startswith(magic)]
  if not start:
    kinds = ['empty']
  elif start[257:262] == b'ustar':
    kinds = ['an archive of tar: unpack the archive first']
  if kinds:
    file.close()
    raise ConfigError(f'{path} is {kinds[0]}')
  return file  # type: ignore[return-value]


# The two formats.


def _read_zip(file):
  size = file.seek(0, io.SEEK_END)
  with zipfile.ZipFile(file) as archive:
    members = archive.infolist()
    names = {member.filename for member in members}
    if any(name.endswith('/constants.pkl') for name in names):
      raise _Refused('a program of TorchScript', 'save the state_dict of the module instead')
    _check_members(members, size)
    pickles = [name for name in names if name.endswith('/data.pkl') and name.count('/') == 1]
    if len(pickles) != 1:
      raise ValueError('the archive has no data.pkl')
    folder = pickles[0].removesuffix('data.pkl')
    if f'{folder}byteorder' in names and archive.read(f'{folder}byteorder') != b'little':
      raise ValueError('its numbers are not little-endian')
    if archive.getinfo(pickles[0]).file_size > PICKLE:
      raise ValueError(f'its pickle is larger than {PICKLE // 2**20} MB')
    tree = _unpickle(io.BytesIO(archive.read(pickles[0])))
    return _with_arrays(tree, lambda key: archive.read(f'{folder}data/{key}'), size)


def _check_members(members, size):
  """Raises ValueError if the members of an archive of `size` bytes need more memory than the archive."""
  if len(members) > MEMBERS or len({member.filename for member in members}) < len(members):
    raise ValueError('the archive has too many members, or two of the same name')
  for member in members:
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
      raise ValueError(f'{member.filename!r} is compressed, which torch.save does not do')
    if member.flag_bits & 1:
      raise ValueError(f'{member.filename!r} is encrypted')
  if sum(member.file_size for member in members) > size:
    raise ValueError('the members of the archive are larger than the archive')


def _read_legacy(file):
  with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
    if _unpickle(data) != MAGIC:
      raise ValueError('it is a pickle, but not of torch.save')
    protocol, system, tree = (_unpickle(data) for _ in range(3))
    if protocol != PROTOCOL or system['little_endian'] is not True:
      raise ValueError('its numbers are not little-endian, or its version is unknown')
    keys = _unpickle(data)
    wanted = {s.key: s for s in _storages(tree)}
    if not isinstance(keys, list) or set(keys) != wanted.keys() or len(keys) != len(wanted):
      raise ValueError('the list of its storages does not fit to its tensors')
    found = {}
    for key in keys:
      (size,) = struct.unpack('<q', data.read(8))
      if size * wanted[key].dtype.itemsize != wanted[key].nbytes:
        raise ValueError(f'a storage has {size:,} values instead of {wanted[key].size:,}')
      found[key] = data.read(wanted[key].nbytes)
    return _with_arrays(tree, found.__getitem__, len(data))


def _storages(tree) -> Iterator[_Storage]:
  """The storages of all tensors in a tree of `_unpickle`."""
  for value in _values(tree):
    if isinstance(value, _View):
      yield value.storage
    elif isinstance(value, _Storage):
      yield value


def _children(value):
  if isinstance(value, dict):
    return list(value.values())
  return value if isinstance(value, (list, tuple)) else []


def _values(tree) -> Iterator[Any]:
  """All values in nested containers, a value that is named twice twice.

  Raises:
    ValueError: there are too many, or they are nested too deeply: containers that contain themselves, or bombs.
  """
  level, count = [tree], 0
  for _ in range(DEPTH):
    yield from level
    following: list[Any] = []
    for value in level:
      children = _children(value)
      count += len(children)
      if count > VALUES:
        raise ValueError(f'it contains more than {VALUES:,} values')
      following += children
    level = following
    if not level:
      return
  raise ValueError(f'it is nested more than {DEPTH} levels deep')


def _with_arrays(tree, load: Callable[[str], bytes], size: int) -> Any:
  """A tree of `_unpickle` with arrays instead of views; `load` reads the bytes of a storage from a file of `size` bytes."""
  buffers: dict[_Storage, bytes] = {}
  for storage in _storages(tree):
    if storage.nbytes > size:
      raise ValueError(f'a storage of {storage.nbytes:,} bytes is larger than the file')
    if storage not in buffers:
      buffers[storage] = load(storage.key)
      if len(buffers[storage]) != storage.nbytes:
        raise ValueError(
          f'storage {storage.key!r} has {len(buffers[storage]):,} bytes instead of {storage.nbytes:,}'
        )
  if sum(v.nbytes for v in _values(tree) if isinstance(v, _View)) > 16 * size + 2**26:
    raise ValueError('its overlapping tensors are 16 times larger than the file')

  def convert(value):
    if isinstance(value, dict):
      return {key: convert(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
      return type(value)(convert(item) for item in value)
    if isinstance(value, _View):
      flat = np.frombuffer(buffers[value.storage], np.uint8)[value.offset * value.dtype.itemsize :]
      if not value.nbytes:
        return np.zeros(value.shape, value.dtype)
      # A part of whole values: the rest of a storage of bytes may not be one.
      flat = flat[: len(flat) // value.dtype.itemsize * value.dtype.itemsize].view(value.dtype)
      strides = [stride * value.dtype.itemsize for stride in value.strides]
      return np.lib.stride_tricks.as_strided(flat, value.shape, strides, writeable=False)
    if isinstance(value, _Storage):
      return np.frombuffer(buffers[value], value.dtype)
    if isinstance(value, _Numpy):
      return value.code or value.value
    return value.name if isinstance(value, _Function) else value

  return convert(tree)


# The interpreter of pickles.

PUSHED = {  # instructions that push their argument
  'INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4', 'FLOAT', 'BINFLOAT', 'STRING', 'BINSTRING',
  'SHORT_BINSTRING', 'UNICODE', 'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8', 'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8',
}  # fmt: skip
CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()}
EMPTY = {'EMPTY_LIST': list, 'EMPTY_DICT': dict, 'EMPTY_SET': list}
MARK = object()


def _unpickle(file: Any) -> Any:
  """The object of the next pickle in `file`: containers, numbers, `_View` and `_Storage`.

  Raises:
    _Refused: the pickle calls a function that is not one of `FUNCTIONS`.
    ValueError, TypeError, LookupError: the pickle is damaged.
  """
  stack: list[Any] = []
  memo: dict[int, Any] = {}
  for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
    if count > INSTRUCTIONS:
      raise ValueError(f'its pickle has more than {INSTRUCTIONS:,} instructions')
    name, arg = opcode.name, cast(Any, argument)
    if name == 'STOP':
      return stack.pop()
    if name in PUSHED:
      stack.append(arg)
    elif name in CONSTANTS:
      stack.append(CONSTANTS[name])
    elif name in EMPTY:
      stack.append(EMPTY[name]())
    elif name in ('PUT', 'BINPUT', 'LONG_BINPUT'):
      memo[arg] = stack[-1]
    elif name == 'MEMOIZE':
      memo[len(memo)] = stack[-1]
    elif name in ('GET', 'BINGET', 'LONG_BINGET'):
      stack.append(memo[arg])
    elif name not in ('PROTO', 'FRAME'):
      _step(name, arg, stack)
  raise ValueError('its pickle has no end')


def _step(name: str, arg: Any, stack: list[Any]) -> None:
  """An instruction that changes values on the stack."""
  if name == 'MARK':
    stack.append(MARK)
  elif name == 'POP':
    stack.pop()
  elif name == 'POP_MARK':
    _marked(stack)
  elif name == 'DUP':
    stack.append(stack[-1])
  elif name in ('TUPLE', 'FROZENSET'):
    stack.append(tuple(_marked(stack)))
  elif name in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
    n = int(name[-1])
    stack[-n:] = [tuple(stack[-n:])]
  elif name == 'LIST':
    stack.append(_marked(stack))
  elif name == 'DICT':
    stack.append(_dict(_pairs(_marked(stack))))
  elif name in ('APPEND', 'APPENDS', 'ADDITEMS'):
    items = [stack.pop()] if name == 'APPEND' else _marked(stack)
    _instance(stack[-1], list).extend(items)
  elif name in ('SETITEM', 'SETITEMS'):
    items = [stack.pop(-2), stack.pop()] if name == 'SETITEM' else _marked(stack)
    _instance(stack[-1], dict).update(_dict(_pairs(items)))
  elif name == 'GLOBAL':
    stack.append(_global(*arg.split(' ', 1)))
  elif name == 'STACK_GLOBAL':
    stack.append(_global(_instance(stack.pop(-2), str), _instance(stack.pop(), str)))
  elif name in ('REDUCE', 'NEWOBJ'):
    args = _instance(stack.pop(), tuple)
    stack.append(_instance(stack.pop(), _Function).call(*args))
  elif name == 'BUILD':
    state = stack.pop()
    if isinstance(stack[-1], _Numpy):
      stack[-1].build(state)
    else:  # the versions of the modules of a state_dict
      _instance(stack[-1], dict)
  elif name == 'BINPERSID':
    stack.append(_storage(_instance(stack.pop(), tuple)))
  else:
    raise _Refused(f'the instruction {name}, which torch.save does not write')


def _marked(stack):
  """Removes the values after the last mark, and the mark, from the stack."""
  items = []
  while (value := stack.pop()) is not MARK:
    items.append(value)
  return items[::-1]


def _instance(value, kind):
  if not isinstance(value, kind):
    raise TypeError(f'its pickle has {type(value).__name__} instead of {kind.__name__}')
  return value


def _pairs(items):
  return list(zip(items[::2], items[1::2], strict=True))


def _dict(pairs=()):
  """A dict of (key, value); keys are text or numbers, because others may take forever to compare."""
  for key, _ in pairs:
    if not isinstance(key, (str, int, float, bytes, type(None))):
      raise TypeError(f'a dict has a key of the type {type(key).__name__}')
    if isinstance(key, int) and not -(2**63) <= key < 2**64:
      raise ValueError('a dict has a key of more than 64 bits')
  return dict(pairs)


def _global(module: str, name: str) -> Any:
  """What a name of a module stands for.

  Raises:
    _Refused: it is none of those that `torch.save` needs.
  """
  full = f'{module}.{name}'
  if full in FUNCTIONS:
    return _Function(full, FUNCTIONS[full])
  if module == 'torch' and name in DTYPES:
    return f'torch.{name}'
  if module == 'torch' and STORAGES.get(name.removesuffix('Storage')):
    return np.dtype(DTYPES[STORAGES[name.removesuffix('Storage')]])
  if full in ('torch.storage.UntypedStorage', 'torch.UntypedStorage'):
    return np.dtype(np.uint8)
  if full in ('torch.Tensor', 'torch.nn.parameter.Parameter', 'numpy.ndarray'):
    return full
  if module.startswith('torch') and any(
    part in name for part in ('sparse', 'qtensor', 'QInt', 'QUInt')
  ):
    raise _Refused(
      f'sparse or quantised tensors ({full})', 'save x.to_dense() or x.dequantize() of each'
    )
  modules = ('torch.nn', 'torchvision.', 'timm.', '__torch__', '__main__')
  if module.startswith(modules):
    raise _Refused(f'a whole module or another object of a program ({full}), not a state_dict')
  raise _Refused(f'{full}, which is not called, because that might execute code')


def _storage(pid):
  """The storage that a persistent id describes: ('storage', type, key, device, number of values[, view])."""
  if pid[0] == 'module':
    raise _Refused('a whole module, not a state_dict')
  kind, dtype, key, _, size = pid[:5]
  if kind != 'storage' or any(pid[5:]):
    raise ValueError('its storages are of an unknown kind')
  key, size = _instance(key, (str, int)), _instance(size, int)
  if size < 0:
    raise ValueError(f'a storage has {size} values')
  return _Storage(str(key), _instance(dtype, np.dtype), size)


def _tensor(storage, offset, shape, strides, *rest):
  """`torch._utils._rebuild_tensor` and `_v2`, which has also requires_grad, hooks and perhaps metadata."""
  if any(rest[2:]):
    raise _Refused('a conjugate or negative view', 'save x.resolve_conj().resolve_neg()')
  dtype = _instance(storage, _Storage).dtype
  view = _View(storage, offset, tuple(shape), tuple(strides), dtype)
  view.check()
  return view


def _tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, *metadata):
  """`torch._utils._rebuild_tensor_v3`: the storage has bytes, and the dtype is an argument."""
  view = _tensor(storage, offset, shape, strides, requires_grad, hooks, *metadata)
  view = dataclasses.replace(view, dtype=np.dtype(DTYPES[dtype.removeprefix('torch.')]))
  view.check()
  return view


def _from_type(function, kind, args, state):
  """`torch._tensor._rebuild_from_type_v2`: a tensor with attributes, which are left out."""
  return _instance(function, _Function).call(*args)


def _of_numpy(dtype):
  return np.dtype(_instance(dtype, _Numpy).code)


def _numpy_dtype(code, *_):
  if code not in ('f8', 'f4', 'f2', 'i8', 'i4', 'i2', 'i1', 'u8', 'u4', 'u2', 'u1', 'b1'):
    raise _Refused(f'an array of numpy of the dtype {code}')
  return _Numpy(code)


def _numpy_scalar(dtype, data):
  return np.frombuffer(_bytes(data), _of_numpy(dtype), 1)[0].item()


def _bytes(data):
  """Bytes, which Python 2 wrote as text."""
  return data if isinstance(data, bytes) else _instance(data, str).encode('latin1')


FUNCTIONS: dict[str, Callable[..., Any]] = {
  'collections.OrderedDict': _dict,
  'torch.Size': lambda sizes=(): tuple(sizes),
  'torch.device': lambda *parts: ':'.join(map(str, parts)),
  'torch._utils._rebuild_tensor': _tensor,
  'torch._utils._rebuild_tensor_v2': _tensor,
  'torch._utils._rebuild_tensor_v3': _tensor_v3,
  'torch._utils._rebuild_parameter': lambda tensor, *_: _instance(tensor, _View),
  'torch._utils._rebuild_parameter_with_state': lambda tensor, *_: _instance(tensor, _View),
  'torch._tensor._rebuild_from_type_v2': _from_type,
  'torch.serialization._get_layout': str,
  '_codecs.encode': lambda text, encoding: _bytes(text),
  # Arguments of a program and paths, which some files have beside their weights.
  'argparse.Namespace': _dict,
  **{f'pathlib.{kind}': lambda *parts: '/'.join(parts) for kind in PATHS},
  'builtins.set': lambda items=(): list(items),
  '__builtin__.set': lambda items=(): list(items),
  'numpy.dtype': _numpy_dtype,
}
for _module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
  FUNCTIONS[f'{_module}.scalar'] = _numpy_scalar
  FUNCTIONS[f'{_module}._reconstruct'] = lambda *_: _Numpy()


# Writing.


def write(path: pathlib.Path, tree: Mapping[str, Any]) -> None:
  """Writes a file that `torch.load(path, weights_only=True)` reads.

  Args:
    path: the file; its name ends in `.pth`, `.pth.tar`, `.pt` or `.ckpt`.
    tree: nested dicts, lists and tuples of numbers, strings, None, and numpy arrays, which become tensors.

  Raises:
    OSError: the file cannot be written; one sentence.
    TypeError: a value is of another type.
  """
  arrays: list[np.ndarray] = []
  pickle = b'\x80\x02' + _pickled(tree, arrays) + b'.'
  with files.atomic(path) as file, zipfile.ZipFile(file, 'w', allowZip64=True) as archive:
    for name, data in (('data.pkl', pickle), ('byteorder', b'little'), ('version', b'3\n')):
      archive.writestr(zipfile.ZipInfo(f'archive/{name}'), data)
    for i, x in enumerate(arrays):
      archive.writestr(zipfile.ZipInfo(f'archive/data/{i}'), x.tobytes())


def _pickled(value: Any, arrays: list[np.ndarray]) -> bytes:
  """The instructions that push a value; its arrays are appended to `arrays`."""
  if isinstance(value, np.ndarray):
    return _pickled_array(value, arrays)
  if isinstance(value, Mapping):
    items = b''.join(_pickled(k, arrays) + _pickled(v, arrays) for k, v in value.items())
    return b'}(' + items + b'u'
  if isinstance(value, (list, tuple)):
    items = b''.join(_pickled(item, arrays) for item in value)
    return b']' + b'(' + items + b'e' if isinstance(value, list) else b'(' + items + b't'
  if value is None:
    return b'N'
  if isinstance(value, (bool, np.bool_)):
    return b'\x88' if value else b'\x89'
  if isinstance(value, (int, np.integer)):
    data = int(value).to_bytes(int(value).bit_length() // 8 + 1, 'little', signed=True)
    return b'\x8a' + bytes([len(data)]) + data
  if isinstance(value, (float, np.floating)):
    return b'G' + struct.pack('>d', value)
  if isinstance(value, str):
    data = value.encode()
    return b'X' + struct.pack('<I', len(data)) + data
  raise TypeError(f'{type(value).__name__} is not written to a file of PyTorch')


def _pickled_array(x: np.ndarray, arrays: list[np.ndarray]) -> bytes:
  """`_pickled` of an array: a view of the whole of its own storage."""
  kinds = {np.dtype(DTYPES[dtype]): kind for kind, dtype in STORAGES.items()}
  if x.dtype not in kinds:
    raise TypeError(f'arrays of {x.dtype} are not written to a file of PyTorch')
  strides = [math.prod(x.shape[i + 1 :]) for i in range(x.ndim)]
  storage = b''.join((
    b'(', _pickled('storage', arrays), f'ctorch\n{kinds[x.dtype]}Storage\n'.encode(),
    _pickled(str(len(arrays)), arrays), _pickled('cpu', arrays), _pickled(x.size, arrays), b'tQ',
  ))  # fmt: skip
  arrays.append(x)
  numbers = (_pickled(0, arrays), _pickled(x.shape, arrays), _pickled(tuple(strides), arrays))
  hooks = b'\x89ccollections\nOrderedDict\n)R'
  return b'ctorch._utils\n_rebuild_tensor_v2\n(' + storage + b''.join(numbers) + hooks + b'tR'


# Safetensors.


def _check_header(path, file) -> None:
  """Refuses a file whose header does not fit to its size, before the rest is read."""
  size = file.seek(0, io.SEEK_END)
  file.seek(0)
  length = int.from_bytes(file.read(8), 'little')
  if not 2 <= length <= min(size - 8, HEADER):
    raise ConfigError(
      f'{path} is damaged or no file of safetensors: its header has {length:,} bytes'
    )
  try:
    header = json.loads(file.read(length))
    ends = [about['data_offsets'][1] for name, about in header.items() if name != '__metadata__']
    declared = 8 + length + max(ends, default=0)
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
    raise ConfigError(f'{path} is damaged or no file of safetensors: its header') from None
  if declared != size:
    raise ConfigError(f'{path} is damaged: it has {size:,} bytes instead of {declared:,}')
  file.seek(0)


def read_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """The arrays in a file of safetensors, by name, and its metadata; dtypes as for `read`.

  Raises:
    ConfigError: the file is damaged or of another kind; one sentence.
  """
  try:
    with open_checked(path) as file:
      _check_header(path, file)
      data = file.read()
  except OSError as error:
    raise ConfigError(f'{path} cannot be read: {error.strerror or error}') from None
  except MemoryError:
    raise ConfigError(f'{path} is larger than the memory') from None
  try:
    found = safetensors.deserialize(data)
  except safetensors.SafetensorError as error:
    raise ConfigError(
      f'{path} is damaged or no file of safetensors: {printable(error)[:200]}'
    ) from None
  arrays = {}
  for name, about in found:
    if about['dtype'] not in SAFETENSORS:
      raise ConfigError(
        f'{path}: {printable(name)} has the dtype {about["dtype"]}, which is not read'
      )
    dtype = np.dtype(DTYPES[SAFETENSORS[about['dtype']]])
    arrays[name] = np.frombuffer(about['data'], dtype).reshape(about['shape'])
  header = json.loads(data[8 : 8 + int.from_bytes(data[:8], 'little')])
  return arrays, header.get('__metadata__', {})
