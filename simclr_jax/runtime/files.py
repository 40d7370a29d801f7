"""Atomic writing of files."""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from simclr_jax.runtime import paths


@contextlib.contextmanager
def atomic(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A context manager that yields a temporary path, which replaces `path` when the block ends without an error.

  The temporary file is in the same folder and has the same suffix, because some writers choose the format by the
  suffix. In a bucket, where writing is atomic, the block gets `path` itself.
  """
  if paths.is_remote(path):
    yield path
    return
  handle, name = tempfile.mkstemp(path.suffix, f'.{path.stem}.', path.parent)
  os.close(handle)
  temporary = path.with_name(pathlib.Path(name).name)
  try:
    temporary.chmod(0o666 & ~_umask())
    yield temporary
    temporary.replace(path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def _umask():
  mask = os.umask(0)
  os.umask(mask)
  return mask


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text file atomically."""
  with atomic(path) as temporary:
    temporary.write_text(text, encoding='utf-8')


def write_json(path: pathlib.Path, value: Any, indent: int | None = 1) -> None:
  """Writes a JSON file atomically; `indent` as for `json.dumps`."""
  write_text(path, json.dumps(value, indent=indent) + '\n')
