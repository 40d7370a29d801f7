"""Versions of the software on which results depend."""

import functools
import importlib.metadata
import pathlib
import platform
import subprocess

from simclr_jax import __version__

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


@functools.cache  # called for every checkpoint, and git is a separate process
def versions() -> dict[str, str]:
  """Versions of this package, of Python and of `PACKAGES`; in a git checkout, also the commit, as 'git'."""
  installed = {'simclr_jax': __version__, 'python': platform.python_version()}
  for name in PACKAGES:
    try:
      installed[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      installed[name] = 'not installed'
  commit = _git_commit(pathlib.Path(__file__).resolve().parents[2])
  return installed | ({'git': commit} if commit else {})


def _git_commit(checkout):
  command = ['git', '-C', str(checkout), 'rev-parse', '--show-toplevel', 'HEAD']
  try:
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  except (OSError, subprocess.CalledProcessError):
    return ''
  top, commit = output.split('\n')[:2]
  # Ignores a repository that merely contains the virtual environment.
  return commit if pathlib.Path(top) == checkout else ''
