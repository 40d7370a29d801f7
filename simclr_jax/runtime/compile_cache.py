"""A faster start: compiled programs are kept in the user's cache folder; programs that run once are compiled quickly.

JAX's own files are not used, because JAX reads a file that another process is still writing, never replaces a damaged
one, and needs another package to limit their size.
"""

import logging
import os
import pathlib
import platform
import re
import secrets
import stat
import zlib
from typing import Any

import jax
from jax._src import compilation_cache  # JAX has no public function for caches of one's own
from jax._src.compilation_cache_interface import CacheInterface

LIMIT = 2**30  # bytes of all programs, unless JAX_COMPILATION_CACHE_MAX_SIZE is set
SUFFIX = '.program'


def enable() -> None:
  """Keeps the programs of this process, and uses those that earlier ones have kept. Call it before the first is compiled.

  The folder is `simclr_jax` in $XDG_CACHE_HOME, or else in ~/.cache. If it cannot be used, a warning says why, and
  nothing is kept. Nothing changes if JAX_COMPILATION_CACHE_DIR names a folder, which JAX then uses by itself, or if
  JAX_ENABLE_COMPILATION_CACHE=false.
  """
  try:
    cache = folder()
  except (OSError, RuntimeError) as error:
    _warn(error)
    return
  if cache is None:
    return
  limit = jax.config.values['jax_compilation_cache_max_size']
  programs = Cache(cache, LIMIT if limit < 0 else limit)
  compilation_cache.get_file_cache = lambda path: (programs, path)
  jax.config.update('jax_compilation_cache_dir', str(cache))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')  # files without a limit


def folder() -> pathlib.Path | None:
  """The folder of the programs, made if there is none; None if JAX's own options leave nothing to do here.

  Raises:
    OSError, RuntimeError: it cannot be used.
  """
  options = jax.config.values
  if options['jax_compilation_cache_dir'] or not options['jax_enable_compilation_cache']:
    return None
  base = pathlib.Path(os.environ.get('XDG_CACHE_HOME', ''))
  cache = (base if base.is_absolute() else pathlib.Path.home() / '.cache') / 'simclr_jax'
  _check(cache)
  return cache


def init_options(platform: str) -> dict[str, Any] | None:
  """Compiler options of a program that computes initial values.

  On CPUs, LLVM's further optimisations take most of the time of compiling, and do not change the values.

  Args:
    platform: of the devices, such as 'cpu'.
  """
  level = 'xla_backend_optimization_level'
  if platform != 'cpu' or level in os.environ.get('XLA_FLAGS', ''):
    return None
  return {level: 1}


def _check(folder):
  """Makes the folder. Raises OSError if others could put programs there, because a program can do anything."""
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  found = folder.lstat()
  if not stat.S_ISDIR(found.st_mode):
    raise OSError(f'{folder} is a link or a file')
  if found.st_uid != os.geteuid():
    raise OSError(f'{folder} belongs to another user')
  if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
    raise OSError(f'{folder} can be written by other users (chmod 700 {folder})')
  if not os.access(folder, os.W_OK | os.X_OK):
    raise OSError(f'{folder} cannot be written')


def _warn(error):
  reason = f'{error.filename}: {error.strerror}' if getattr(error, 'filename', None) else error
  logging.warning('compiled programs are not kept for the next start: %s', reason)


class Cache(CacheInterface):
  """A folder of compiled programs, which several processes may use at the same time.

  A file has the CRC-32 checksum of a program, 4 bytes, and the program. It appears at once with all of its contents.
  """

  def __init__(self, folder: pathlib.Path, limit: int):
    """`limit`: bytes of all files; those that were not used for the longest time are removed."""
    self._path = folder  # JAX needs this name
    self._limit = limit
    self._machine = f'{zlib.crc32(_processor().encode()):08x}'
    self._warned = False

  def get(self, key: str) -> bytes | None:
    """The program of a key; None if there is none, or a damaged one."""
    file = self._file(key)
    try:
      content = file.read_bytes()
      os.utime(file)
    except OSError:
      return None
    return content[4:] if content[:4] == _checksum(content[4:]) else None

  def put(self, key: str, value: bytes) -> None:
    """Keeps a program. If it cannot be written, a warning is logged, once."""
    temporary = self._path / f'{secrets.token_hex(8)}{SUFFIX}'
    try:
      temporary.write_bytes(_checksum(value) + value)
      temporary.replace(self._file(key))
      self._remove_old()
    except OSError as error:
      temporary.unlink(missing_ok=True)
      if not self._warned:
        _warn(error)
      self._warned = True

  def _file(self, key):
    return self._path / f'{key}-{self._machine}{SUFFIX}'

  def _remove_old(self):
    """Removes the files that were not used for the longest time, down to the limit; other processes may do the same."""
    files = []
    for entry in os.scandir(self._path):
      if entry.name.endswith(SUFFIX):
        try:
          found = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
          continue
        files.append((found.st_mtime_ns, found.st_size, entry.path))
    size = sum(size for _, size, _ in files)
    for _, removed, path in sorted(files):
      if size <= self._limit:
        return
      pathlib.Path(path).unlink(missing_ok=True)
      size -= removed


def _checksum(value):
  return zlib.crc32(value).to_bytes(4, 'big')


def _processor() -> str:
  """The processor and its instructions. A program for the CPU may use any of them, and home folders are shared."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return f'{platform.machine()} {platform.processor()}'
  lines = [line for line in lines if re.match(r'(model name|flags|Features|isa)\s*:', line)]
  return '\n'.join(sorted(set(lines)))
