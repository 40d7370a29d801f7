"""Reading and writing of files: nothing partial under a final name, no link followed, nothing unbounded read.

All local files that this package writes are written here: as a whole by `atomic`, `write_text`, `write_json` and
`new_folder`, line by line by `append`. They are written under a temporary name in the same folder and then moved; the
leftover of a process that was killed is removed by the next writer. Files that others may have edited are read here.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from typing import IO, Any, BinaryIO

from simclr_jax.errors import ConfigError
from simclr_jax.runtime import paths

PREFIX = '.simclr-jax-'  # of temporary names
TEXT_LIMIT = 256 * 2**20  # bytes of a JSON file


# Writing.


@contextlib.contextmanager
def atomic(path: pathlib.Path) -> Iterator[BinaryIO]:
  """A context manager that yields a new binary file, which replaces `path` when the block ends without an error.

  The name of the file has the suffix of `path`, because some writers choose the format by the suffix. A link at `path`
  is replaced and not followed. In a bucket, where writing is atomic, the file is `path` itself.

  Raises:
    OSError: the file cannot be written; one sentence.
  """
  if paths.is_remote(path):
    with path.open('wb') as file:
      yield file
    return
  with _sentences(path):
    _remove_leftovers(path.parent)
    with _temporary_file(path.parent, path.suffix) as file:
      temporary = pathlib.Path(file.name)
      try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        temporary.replace(path)
      except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextlib.contextmanager
def new_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A context manager that yields a new folder, which becomes `path` when the block ends without an error.

  `path` must not exist or be an empty folder. In a bucket, which has no folders, the folder is `path` itself: write the
  file that marks it as complete last.

  Raises:
    OSError: the folder cannot be written; one sentence.
  """
  if paths.is_remote(path):
    path.mkdir(parents=True, exist_ok=True)
    yield path
    return
  with _sentences(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    temporary = path.with_name(f'{PREFIX}{secrets.token_hex(4)}')
    temporary.mkdir()
    try:
      with _locked_folder(temporary):
        yield temporary
        _sync_folder(temporary)
        temporary.rename(path)
    except BaseException as error:
      for _ in range(50):  # threads of Orbax may still write
        shutil.rmtree(temporary, ignore_errors=True)
        if not temporary.exists():
          break
        time.sleep(0.1)
      if isinstance(error, OSError) and str(temporary) in str(error):
        raise OSError(str(error).replace(str(temporary), str(path))) from None
      raise
    _sync_folder(path.parent)


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text file atomically; what UTF-8 cannot represent, in names of files, is written as \\uNNNN."""
  with atomic(path) as file:
    file.write(text.encode('utf-8', 'backslashreplace'))


def write_json(path: pathlib.Path, value: Any, indent: int | None = 1) -> None:
  """Writes a JSON file atomically; `indent` as for `json.dumps`."""
  write_text(path, json.dumps(value, indent=indent) + '\n')


def append(path: pathlib.Path) -> IO[str]:
  """Opens a local text file to append lines to it.

  Raises:
    OSError: the file cannot be written, or is a link or no regular file; one sentence.
  """
  with _sentences(path):
    return os.fdopen(_open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 'a')


@contextlib.contextmanager
def locked(path: pathlib.Path, wait: bool = True) -> Iterator[bool]:
  """A context manager that holds the lock of a local file, which is created if necessary.

  Args:
    path: the file.
    wait: whether to wait until another process has released the lock.

  Yields:
    False if another process holds the lock; True also where the file system has no locks.

  Raises:
    OSError: the file cannot be written, or is a link or no regular file; one sentence.
  """
  with _sentences(path):
    file = _open_regular(path, os.O_RDWR | os.O_CREAT)
  try:
    yield _lock(file, wait)
  finally:
    os.close(file)


def _lock(file: int, wait: bool = False) -> bool:
  """Locks an open file; False if another process has it."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError:
    return False
  except OSError:  # some network file systems have no locks
    pass
  return True


def _open_regular(path, flags, mode=0o666) -> int:
  """Opens a regular file, without following a link and without waiting for the other end of a pipe."""
  descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
  if not stat.S_ISREG(os.fstat(descriptor).st_mode):
    os.close(descriptor)
    raise OSError(0, 'it is no regular file', str(path))
  return descriptor


def _temporary_file(folder, suffix) -> BinaryIO:
  """A new file, locked as long as it is open, so that other writers know that it is no leftover."""
  while True:
    # 'x' fails instead of opening what exists.
    file = (folder / f'{PREFIX}{secrets.token_hex(4)}{suffix}').open('xb')
    _lock(file.fileno())
    if os.path.lexists(file.name):  # not removed before it was locked
      return file
    file.close()


@contextlib.contextmanager
def _locked_folder(folder):
  descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
  try:
    _lock(descriptor)
    yield
  finally:
    os.close(descriptor)


def _remove_leftovers(folder):
  """Removes the temporary files and folders of writers that were killed: those that nobody has locked."""
  with contextlib.suppress(OSError):
    names = [n for n in os.listdir(folder) if re.match(re.escape(PREFIX) + r'[0-9a-f]{8}', n)]
    for path in (folder / name for name in names):
      with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
          fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
          shutil.rmtree(path) if path.is_dir() else path.unlink()
        finally:
          os.close(descriptor)


def _sync_folder(folder):
  """Makes the names in a folder durable, where the file system can."""
  with contextlib.suppress(OSError):
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


@contextlib.contextmanager
def _sentences(path):
  """Turns an error of the operating system into a sentence with the name of the file."""
  try:
    yield
  except OSError as error:
    if error.strerror is None:  # a sentence already
      raise
    reason = 'it is a link' if error.errno == errno.ELOOP else error.strerror
    raise OSError(f'{path} cannot be written: {reason}') from None


# Reading.


def open_to_read(path: pathlib.Path) -> BinaryIO:
  """Opens a file that others may have edited. Links are followed.

  Raises:
    FileNotFoundError: it does not exist.
    ConfigError: it cannot be read, or is no regular file; one sentence.
  """
  try:
    if paths.is_remote(path):
      return io.BytesIO(path.read_bytes())  # files of some file systems lack a part of the methods
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
      return os.fdopen(descriptor, 'rb')
    os.close(descriptor)
  except FileNotFoundError:
    raise
  except OSError as error:
    raise ConfigError(f'{path} cannot be read: {error.strerror or error}') from None
  raise ConfigError(f'{path} is no regular file')


def read_text(path: pathlib.Path, limit: int = TEXT_LIMIT) -> str:
  """The text of a file that others may have edited.

  Args:
    path: the file, local or in a bucket.
    limit: the largest size in bytes.

  Raises:
    FileNotFoundError: it does not exist.
    ConfigError: it cannot be read, is no regular file, too large or not UTF-8; one sentence.
  """
  with open_to_read(path) as file:
    try:
      data = file.read(limit + 1)
    except OSError as error:
      raise ConfigError(f'{path} cannot be read: {error.strerror or error}') from None
  if len(data) > limit:
    raise ConfigError(f'{path} is larger than {limit // 2**20:,} MB')
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as error:
    raise ConfigError(f'{path} is damaged: byte {error.start:,} is not UTF-8') from None


def read_json(path: pathlib.Path, limit: int = TEXT_LIMIT) -> Any:
  """The value in a JSON file that others may have edited; arguments as for `read_text`.

  Raises:
    FileNotFoundError: it does not exist.
    ConfigError: as for `read_text`, or it is not JSON; one sentence.
  """
  text = read_text(path, limit)
  try:
    return json.loads(text)
  except ValueError as error:
    raise ConfigError(f'{path} is damaged: {error}') from None
  except RecursionError:
    raise ConfigError(f'{path} is damaged: it is nested too deeply') from None
