"""Saves and restores checkpoints. Only this file imports Orbax.

A checkpoint is an Orbax directory with custom metadata: a CRC-32 checksum of every leaf, since Orbax does not detect
flipped bits, the shapes, what the caller adds (config, step, versions), and a checksum of all this metadata.
"""

import contextlib
import json
import pathlib
import re
import shutil
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from simclr_jax.errors import ConfigError
from simclr_jax.runtime import distributed, files, paths
from simclr_jax.runtime.checksum import crc32
from simclr_jax.validation import check_json

PyTree = Any
CHECKSUM = 'metadata_crc32'  # of all other metadata; checkpoints of old versions have none
METADATA = {
  'crc32': {str: int}, 'shapes?': {str: [([int], str)]}, 'step?': int, 'config?': {str: object},
  'versions?': {str: str}, 'images?': {'fingerprint': str, 'images': int, 'place': str},
}  # fmt: skip
COMPRESSION = 200  # largest ratio of the size of all arrays to the size of the files


class CheckpointError(RuntimeError):
  """A checkpoint could not be written, or no checkpoint can be read."""


def digest(tree: PyTree) -> dict[str, int]:
  """The CRC-32 checksum of every leaf, by its path. All processes must call this function."""
  return {
    jax.tree_util.keystr(path): crc32(_on_host(leaf))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _on_host(leaf):
  """An array, whose parts may be on the devices of several processes, as a numpy array on this host."""
  if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
    return multihost_utils.process_allgather(leaf, tiled=True)
  return jax.device_get(leaf)


def abstract(tree: PyTree) -> PyTree:
  """Shapes, dtypes and shardings of `tree`, as a target for `restore`."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save_tree(path: pathlib.Path, tree: PyTree, metadata: dict[str, Any]) -> None:
  """Writes a tree of arrays and metadata, plain data, to the new directory `path`.

  Raises:
    CheckpointError: it was not written.
  """
  metadata = _with_checksum({**metadata, 'crc32': digest(tree)})
  try:
    ocp.save(paths.absolute(path), tree, custom_metadata=metadata)
  except Exception as error:  # Orbax raises many types
    raise CheckpointError(f'{path} was not written: {_reason(error)}') from error


def _with_checksum(metadata):
  return {**metadata, CHECKSUM: _checksum_of(metadata)}


def _checksum_of(metadata):
  return crc32(json.dumps(metadata, sort_keys=True))


def load_tree(path: pathlib.Path, target: PyTree | None = None) -> tuple[PyTree, dict[str, Any]]:
  """Reads a directory that `save_tree` wrote, or a checkpoint of a run.

  Args:
    path: the directory.
    target: the shapes and dtypes that the arrays must have; None: any.

  Returns:
    The tree, of numpy arrays, and its metadata.

  Raises:
    CheckpointError: the directory cannot be read, has other shapes, or a checksum does not match.
  """
  metadata = _metadata(path)
  try:
    stored = ocp.metadata(paths.absolute(path)).metadata
    _check_size(path, stored)
    found, expected = (
      _by_name(_shapes(stored)),
      _by_name(_shapes(stored if target is None else target)),
    )
  except CheckpointError:
    raise
  except Exception as error:  # Orbax raises many types, including Exception itself
    raise _unreadable(path, error) from error
  wrong = [k for k in sorted(found.keys() | expected.keys()) if found.get(k) != expected.get(k)]
  if wrong:
    raise CheckpointError(
      f'{path} is damaged or of another network: {wrong[0]} is {found.get(wrong[0])} there, not {expected.get(wrong[0])}'
    )
  arrays = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), stored if target is None else target)
  tree = _load(path, arrays)
  _check_digest(path, tree, metadata)
  return tree, metadata


def _load(path, target):
  try:
    return ocp.load(paths.absolute(path), target)
  except Exception as error:  # Orbax raises many types, including Exception itself
    raise _unreadable(path, error) from error


def _unreadable(path, error) -> CheckpointError:
  return CheckpointError(f'{path} is unreadable: {type(error).__name__}: {_reason(error)}')


def _reason(error):
  """The message of an exception of Orbax, short; of an error of the operating system, only that."""
  text = str(error).split('. See full')[0].split('\n')[0]
  system = re.search(r'([^:]*) \[os_error_code=', text)
  return system[1].strip() if system else text[:300]


def _metadata(path) -> dict[str, Any]:
  """The custom metadata of a checkpoint, whose checksum and types are right.

  Raises:
    CheckpointError: it cannot be read or is damaged, or the checkpoint is not of this program or of another step.
  """
  path = paths.absolute(path)
  try:
    # Not through Orbax, which prints a damaged file to its last byte.
    metadata = files.read_json(path / '_CHECKPOINT_METADATA')['custom_metadata']
  except FileNotFoundError:
    raise CheckpointError(f'{path} is incomplete: it has no _CHECKPOINT_METADATA') from None
  except ConfigError as error:
    raise CheckpointError(str(error)) from None
  except (KeyError, TypeError):
    metadata = None
  if not isinstance(metadata, dict) or 'crc32' not in metadata:
    raise CheckpointError(f'{path} has no checksums: it was not written by simclr-jax')
  expected = metadata.pop(CHECKSUM, None)
  if expected not in (None, _checksum_of(metadata)):
    raise CheckpointError(f'{path} is damaged: the checksum of its metadata does not match')
  try:
    check_json(metadata, METADATA, f'{path} is damaged: metadata')
  except ConfigError as error:
    raise CheckpointError(str(error)) from None
  if path.name.isdecimal() and metadata.get('step', int(path.name)) != int(path.name):
    raise CheckpointError(f'{path} was renamed: it is the checkpoint of step {metadata["step"]}')
  return metadata


def _check_size(path, tree):
  """Refuses arrays that are much larger than the files: reading them would only use up the memory."""
  if paths.is_remote(path):
    return
  declared = sum(
    np.prod(x.shape, dtype=float) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)
  )
  stored = sum(file.stat().st_size for file in path.rglob('*') if file.is_file())
  if declared > COMPRESSION * max(stored, 2**20):
    raise CheckpointError(
      f'{path} is damaged: it declares {declared / 2**30:,.1f} GiB of arrays in {stored / 2**20:,.1f} MiB of files'
    )


def _check_digest(path, tree, metadata):
  actual, expected = (_by_name(values) for values in (digest(tree), metadata['crc32']))
  wrong = sorted(k for k in actual.keys() | expected.keys() if actual.get(k) != expected.get(k))
  if wrong:
    raise CheckpointError(f'{path} is damaged: the checksum of {wrong[0]} does not match')


def _by_name(values):
  """Values by the path of a leaf, where the attributes of a state and the keys of a dict are written alike."""
  return {re.sub(r"\.(\w+)|\['(\d+)'\]", _as_key, path): value for path, value in values.items()}


def _as_key(match):
  name, index = match.groups()
  return f"['{name}']" if name else f'[{index}]'


def steps(folder: pathlib.Path) -> list[int]:
  """Steps of the finished checkpoints in `folder`, ascending."""
  if not folder.is_dir():
    return []
  checkpoints = [
    p for p in folder.iterdir() if re.fullmatch('0|[1-9][0-9]{0,17}', p.name) and p.is_dir()
  ]
  if paths.is_remote(folder):  # Orbax writes in place and marks a finished checkpoint with a file
    checkpoints = [p for p in checkpoints if (p / 'commit_success.txt').exists()]
  return sorted(int(p.name) for p in checkpoints)


def last_step(folder: pathlib.Path) -> int:
  """Step of the newest finished checkpoint in `folder`; 0 if there is none."""
  return (steps(folder) or [0])[-1]


def exists(folder: pathlib.Path) -> bool:
  """Whether `folder` contains checkpoints, readable or damaged."""
  return bool(steps(folder)) or any(folder.glob('corrupt-*'))


def newest_metadata(folder: pathlib.Path) -> dict[str, Any] | None:
  """The metadata of the newest checkpoint whose metadata can be read; None without one. No array is read."""
  for step in reversed(steps(folder)):
    with contextlib.suppress(CheckpointError):  # `restore` reports the damaged checkpoint
      return _metadata(folder / str(step))
  return None


def checksum(metadata: dict[str, Any]) -> str:
  """The checksum of all arrays of a checkpoint, 8 hexadecimal digits, from its metadata."""
  return f'{crc32(json.dumps(metadata["crc32"], sort_keys=True)):08x}'


def restore(
  folder: pathlib.Path, target: PyTree, quarantine: bool = False
) -> tuple[PyTree, dict[str, Any]] | None:
  """Restores the newest readable checkpoint. All processes must call this function.

  Args:
    folder: the folder of the checkpoints of a run.
    target: abstract arrays with shardings, see `abstract`.
    quarantine: whether newer, unreadable checkpoints are renamed to `corrupt-<step>`, so that these steps can be saved
      again. Only the run itself may do this.

  Returns:
    The state and its metadata; None if there are no checkpoints.

  Raises:
    CheckpointError: there are checkpoints, but none is readable.
    ConfigError: the newest checkpoint is readable, but its shapes are not those of the target.
  """
  damaged: list[pathlib.Path] = []
  saved = distributed.gather(steps(folder))[0]  # one process decides which checkpoints exist
  newest = saved[-1:]
  while saved:
    step = saved.pop()
    path = folder / str(step)
    try:
      _on_all(_check_shapes, path, _shapes(target))
      restored = _on_all(lambda path: (_load(path, target), _metadata(path)), path)
      _on_all(_check_digest, path, *restored)  # a collective operation: all processes take part
    except CheckpointError as error:
      now = distributed.gather(steps(folder))[0]
      if now[-1:] > newest:  # the run has gone on meanwhile, and has removed this checkpoint
        saved, newest, damaged = now, now[-1:], []
        continue
      logging.warning('%s', error)
      damaged.append(path)
      continue
    if quarantine and distributed.is_main_process():
      for path in damaged:
        _quarantine(path, step)
    distributed.barrier('restored')
    return restored
  if damaged or exists(folder):
    raise CheckpointError(
      f'no checkpoint in {folder} can be read ({len(damaged)} tried): restore the folder from a '
      'backup, or choose a new --workdir to start again'
    )
  return None


def remove_old(folder: pathlib.Path, keep: int) -> None:
  """Removes all checkpoints but the `keep` newest readable ones and newer ones, as each save does.

  A kill may have interrupted that, and left a part of an old checkpoint. Only the run itself may do this.
  """
  found, readable = steps(folder), 0
  for step in reversed(found):
    if readable == keep:
      logging.info('removing the old checkpoint %s', folder / str(step))
      _remove(folder / str(step))
      continue
    with contextlib.suppress(CheckpointError):
      _metadata(folder / str(step))
      readable += 1


def _remove(path: Any) -> None:
  if paths.is_remote(path):
    path.rmtree()
  else:
    shutil.rmtree(path)


def _quarantine(path, resumed_step):
  suffixes = ('', *(f'-{i}' for i in range(2, 99)))
  candidates = (path.with_name(f'corrupt-{path.name}{suffix}') for suffix in suffixes)
  new = next(candidate for candidate in candidates if not candidate.exists())
  path.rename(new)
  logging.warning('moved %s to %s; resuming from step %d', path.name, new, resumed_step)


def _on_all(work, *args):
  """Calls `work(*args)`; if it raises CheckpointError or ConfigError on one process, all processes raise it."""
  kinds = {kind.__name__: kind for kind in (CheckpointError, ConfigError)}
  result = failure = None
  try:
    result = work(*args)
  except tuple(kinds.values()) as error:
    failure = [type(error).__name__, str(error)]
  failure = next((f for f in distributed.gather(failure) if f), None)
  if failure:
    raise kinds[failure[0]](failure[1])
  return result


def _shapes(tree):
  return {
    jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _check_shapes(path, shapes):
  """Raises ConfigError if a checkpoint is of another network, and CheckpointError if it cannot be read."""
  stored = _metadata(path).get('shapes')
  if stored is None:
    raise CheckpointError(f'{path} is damaged: it has no shapes')
  for leaf in sorted(stored.keys() | shapes.keys()):
    if stored.get(leaf) != shapes.get(leaf):
      raise ConfigError(
        f'{path} is of another network: {leaf} is {stored.get(leaf)} there and {shapes.get(leaf)} in this '
        'recipe; restore the recipe or choose a new --workdir'
      )


class Saver:
  """Saves checkpoints of a run in the background. A context manager, which waits for the last one at its end."""

  def __init__(self, folder: pathlib.Path, keep: int):
    """Keeps the `keep` newest checkpoints in `folder`."""
    self._folder = folder
    self._checkpointer = ocp.training.Checkpointer(
      paths.absolute(folder),  # a relative path would only fail in the background
      preservation_policy=ocp.training.preservation_policies.LatestN(keep),
      cleanup_tmp_directories=True,
    )

  def __enter__(self):
    return self

  def __exit__(self, *error):
    try:
      self.wait()
    except CheckpointError as failure:
      if error[0] is None:
        raise
      logging.error('%s', failure)  # another exception is being raised already
    finally:
      self._checkpointer.close()

  def save(self, step: int, state: PyTree, metadata: dict[str, Any]) -> None:
    """Starts to save a checkpoint. The buffers of `state` may be donated when this method returns.

    Args:
      step: number of finished steps.
      state: a tree of arrays.
      metadata: plain data to save with the state.

    Raises:
      CheckpointError: the previous checkpoint was not written, or Orbax refuses this one.
    """
    metadata = _with_checksum(
      {**metadata, 'step': step, 'crc32': digest(state), 'shapes': _shapes(state)}
    )
    self.wait()  # raises the error of the previous save
    if self._checkpointer.save_async(step, state, force=True, custom_metadata=metadata) is None:
      raise CheckpointError(f'Orbax refused to save step {step} in {self._folder}')

  def wait(self) -> None:
    """Waits until the last checkpoint is on disk.

    Raises:
      CheckpointError: it was not written.
    """
    try:
      self._checkpointer.wait()
    except Exception as error:
      raise CheckpointError(
        f'a checkpoint in {self._folder} was not written: {_reason(error)}'
      ) from error
