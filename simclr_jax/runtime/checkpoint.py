"""Saving and restoring, the only file that imports Orbax.

A checkpoint is an Orbax directory with the item `state` and, as custom metadata, a JSON of what Orbax
does not know: a CRC-32 for every leaf, since Orbax reads flipped bits without a word, and whatever the
caller adds (config, step, versions).
"""

import pathlib
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from simclr_jax.errors import ConfigError
from simclr_jax.runtime import distributed, paths
from simclr_jax.runtime.checksum import crc32

PyTree = Any


class CheckpointError(RuntimeError):
  """Checkpoints exist and none can be read, or one could not be written."""


def digest(tree: PyTree) -> dict[str, int]:
  """CRC-32 of the bytes of every leaf, by its path."""
  return {
    jax.tree_util.keystr(path): crc32(_whole(leaf))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _whole(leaf):
  """An array on this host, though its parts may be on several."""
  if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
    return multihost_utils.process_allgather(leaf, tiled=True)
  return jax.device_get(leaf)


def abstract(tree: PyTree) -> PyTree:
  """Shapes, dtypes and shardings of `tree`: what restoring needs to know of the target."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save_tree(path: pathlib.Path, tree: PyTree, metadata: dict[str, Any]) -> None:
  """Writes one tree of arrays to the new directory `path`."""
  ocp.save(paths.absolute(path), tree, custom_metadata={**metadata, 'crc32': digest(tree)})


def load_tree(path: pathlib.Path, target: PyTree | None = None) -> tuple[PyTree, dict[str, Any]]:
  """Reads a directory of `save_tree`, or one step of a run: (tree, metadata).

  Args:
    path: the directory.
    target: abstract arrays with shardings; without it, numpy arrays come back.

  Raises:
    CheckpointError: it cannot be read, or its bytes are not those that were written.
  """
  tree, metadata = _read(path, target)
  _check_digest(path, tree, metadata)
  return tree, metadata


def _read(path, target):
  path = paths.absolute(path)
  try:
    metadata = ocp.metadata(path)
    if target is None:
      target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), metadata.metadata)
    return ocp.load(path, target), dict(metadata.custom_metadata or {})
  except Exception as error:  # Orbax raises a dozen types, bare Exception among them
    reason = str(error).split('. See full')[0].split('\n')[0]
    raise CheckpointError(
      f'{path} is unreadable: {type(error).__name__}: {reason[:300]}'
    ) from error


def _check_digest(path, tree, metadata):
  actual, expected = digest(tree), metadata.get('crc32')
  if not expected:
    raise CheckpointError(f'{path} has no checksums: this program did not write it')
  wrong = sorted(k for k in actual.keys() | expected.keys() if actual.get(k) != expected.get(k))
  if wrong:
    raise CheckpointError(f'{path} is damaged: the checksum of {wrong[0]} does not match')


def steps(folder: pathlib.Path) -> list[int]:
  """Steps of the finished checkpoints in `folder`, ascending."""
  if not folder.is_dir():
    return []
  found = [p for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()]
  if paths.is_remote(folder):  # written in place, and marked at the end
    found = [p for p in found if (p / 'commit_success.txt').exists()]
  return sorted(int(p.name) for p in found)


def exists(folder: pathlib.Path) -> bool:
  """Whether a run has saved anything in `folder`, readable or not."""
  return bool(steps(folder)) or any(folder.glob('corrupt-*'))


def restore(
  folder: pathlib.Path, target: PyTree, quarantine: bool = False
) -> tuple[PyTree, dict[str, Any]] | None:
  """The newest readable state in `folder`, or None if there has never been one.

  With `quarantine`, unreadable newer ones are renamed to `corrupt-<step>`: left in place they would
  keep a run from saving these steps again. Only the run that owns the folder may ask for that.

  Raises:
    CheckpointError: there are checkpoints and none is readable.
    ConfigError: the newest is readable but of another network.
  """
  damaged = []
  saved = distributed.gather(steps(folder))[0]  # one process decides which checkpoints exist
  for step in reversed(saved):
    path = folder / str(step)
    try:
      _on_all(_check_shapes, path, _shapes(target))
      restored = _on_all(_read, path, target)
      _on_all(_check_digest, path, *restored)  # computed together: no process may be missing
    except CheckpointError as problem:
      logging.warning('%s', problem)
      damaged.append(path)
      continue
    for bad in damaged if quarantine and distributed.is_main_process() else []:
      names = (f'corrupt-{bad.name}{suffix}' for suffix in ('', *(f'-{i}' for i in range(2, 99))))
      aside = next(folder / name for name in names if not (folder / name).exists())
      bad.rename(aside)
      logging.warning('moved %s to %s; resuming from step %d', bad.name, aside, step)
    distributed.barrier('restored')
    return restored
  if saved or exists(folder):
    raise CheckpointError(
      f'no checkpoint in {folder} can be read ({len(damaged)} tried): restore the folder from a '
      'backup, or choose a new --workdir to start again'
    )
  return None


def _on_all(work, *args):
  """`work(*args)`; a CheckpointError or ConfigError of one process is raised on all processes."""
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
  """A readable checkpoint of another network is a mistake of the user, not damage."""
  try:
    stored = (ocp.metadata(paths.absolute(path)).custom_metadata or {})['shapes']
  except Exception as error:
    raise CheckpointError(f'{path} is unreadable: {type(error).__name__}') from error
  for leaf in sorted(stored.keys() | shapes.keys()):
    if stored.get(leaf) != shapes.get(leaf):
      raise ConfigError(
        f'{path} is of another network: {leaf} is {stored.get(leaf)} there '
        f'and {shapes.get(leaf)} in this recipe'
      )


class Saver:
  """Saves a run's states in the background. Use it as a context manager: leaving waits."""

  def __init__(self, folder: pathlib.Path, keep: int):
    """Keeps the `keep` newest checkpoints in `folder`."""
    self._folder = folder
    self._checkpointer = ocp.training.Checkpointer(
      paths.absolute(folder),  # a relative path would fail in the background only
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
      logging.error('%s', failure)  # the exception that is being raised says more
    finally:
      self._checkpointer.close()

  def save(self, step: int, state: PyTree, metadata: dict[str, Any]) -> None:
    """Starts to write `state`; its buffers may be donated as soon as this returns.

    Raises:
      CheckpointError: this save was refused, or the one before it failed.
    """
    metadata = {**metadata, 'step': step, 'crc32': digest(state), 'shapes': _shapes(state)}
    self.wait()  # an error of the last save is raised here and not lost
    if self._checkpointer.save_async(step, state, force=True, custom_metadata=metadata) is None:
      raise CheckpointError(f'Orbax refused to save step {step} in {self._folder}')

  def wait(self) -> None:
    """Returns when everything is on disk."""
    try:
      self._checkpointer.wait()
    except Exception as error:
      reason = str(error).split('\n')[0]
      raise CheckpointError(
        f'a checkpoint in {self._folder} was not written: {reason[:300]}'
      ) from error
