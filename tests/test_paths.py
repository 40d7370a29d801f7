"""Paths of runs: local folders and buckets."""

import pathlib

import pytest
from conftest import TINY

from simclr_jax import cli, config, train
from simclr_jax.errors import ConfigError
from simclr_jax.runtime import paths

epath = pytest.importorskip('etils.epath')


def test_local_and_remote_paths():
  """Breaks if gs://bucket is read as a local path: gs:/bucket below the working directory."""
  bucket = paths.path('gs://bucket/a b/run')
  assert str(paths.absolute(bucket) / 'checkpoints') == 'gs://bucket/a b/run/checkpoints'
  assert paths.is_remote(bucket) and not paths.is_remote(paths.path('runs/x'))
  assert paths.absolute(paths.path('runs/x')) == pathlib.Path.cwd() / 'runs/x'
  assert paths.path('~/x') == pathlib.Path.home() / 'x'
  with pytest.raises(ConfigError, match='only local folders and gs://'):
    paths.path('ftp://x/y')


@pytest.mark.slow
def test_a_run_uses_only_path_operations_of_buckets(tmp_path, monkeypatch, capsys):
  """Breaks if a file of a run is written with operations that only local paths have. Uses a local
  folder with the file system for buckets.
  """
  backend = pytest.importorskip('etils.epath.backend')
  monkeypatch.setattr(paths, 'path', epath.Path)
  # TensorFlow's file system, as for gs://, instead of Python's.
  tf_backend = property(lambda self: backend.tf_backend)
  monkeypatch.setattr(epath.gpath.PosixGPath, '_backend', tf_backend)
  monkeypatch.setattr(paths, 'is_remote', lambda path: True)
  workdir = epath.Path(tmp_path / 'run')
  for steps in ('2', '2'):
    recipe = config.load('simclr_digits', {**TINY, 'steps': steps, 'checkpoint_every_steps': '1'})
    assert train.pretrain(recipe, workdir, quiet=True) == 0
  assert 'is complete: 2 steps' in capsys.readouterr().out
  assert cli.main(['probe', f'--workdir={tmp_path}/run', '--cached', '--epochs=1']) == 0
