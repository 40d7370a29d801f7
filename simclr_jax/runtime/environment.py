"""Versions of what the numbers depend on."""

import functools
import importlib.metadata
import pathlib
import platform
import subprocess

from simclr_jax import __version__

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


@functools.cache  # every checkpoint records them, and git is a process of its own
def versions() -> dict[str, str]:
  """Versions of this package, Python and `PACKAGES`, and the git commit if this is a checkout."""
  found = {'simclr_jax': __version__, 'python': platform.python_version()}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = 'not installed'
  commit = _git_commit(pathlib.Path(__file__).resolve().parents[2])
  return found | ({'git': commit} if commit else {})


def _git_commit(checkout):
  command = ['git', '-C', str(checkout), 'rev-parse', '--show-toplevel', 'HEAD']
  try:
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  except (OSError, subprocess.CalledProcessError):
    return ''
  top, commit = output.split('\n')[:2]
  # Not a repository that contains the virtual environment.
  return commit if pathlib.Path(top) == checkout else ''
