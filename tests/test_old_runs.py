"""Runs and exports that version 0.1.0 wrote before fields were renamed are read, resumed and evaluated.

data/run_of_0.1.0.tar.gz: `moco`, a run of 4 steps on the digits with checkpoints at 2 and 4; `export`, its encoder;
`features.npy`, what that version computed for the first 16 test images.
"""

import json
import pathlib
import shlex
import shutil
import tarfile

import numpy as np
import pytest
from common import records

from simclr_jax import cli, config, fields, run_config
from simclr_jax.data import digits
from simclr_jax.runs import load_encoder

ARCHIVE = pathlib.Path(__file__).parent / 'data/run_of_0.1.0.tar.gz'


@pytest.fixture(scope='module')
def old(tmp_path_factory):
  folder = tmp_path_factory.mktemp('old')
  with tarfile.open(ARCHIVE) as archive:
    archive.extractall(folder, filter='data')
  return folder


def test_old_names_and_values_are_translated(old):
  """Breaks if a renamed field of an old config.json is lost, or a new field has no neutral value."""
  before = json.loads((old / 'moco/config.json').read_text())['config']
  assert before['model']['dialect'] == 'torchvision' and before['model']['head_norm'] is False
  recipe = run_config.load(old / 'moco')
  assert recipe.model.variant == 'torchvision' and recipe.model.head_norm == 'none'
  assert recipe.rematerialize == 'false'
  assert recipe.model.encoder == '' and recipe.model.head_hidden == 0 and recipe.code == ()
  flat = config.flatten(recipe)
  for name, value in config.flatten(before).items():
    if name != 'model.dialect':
      assert flat[name] == fields.upgraded_value(name, value), name


@pytest.mark.parametrize('source', ['moco', 'export'])
def test_features_are_those_of_the_old_version(old, source):
  """Breaks if an old checkpoint or export is read into another network."""
  images = digits.load(None, 'test').images[:16]
  expected = np.load(old / 'features.npy')
  np.testing.assert_allclose(load_encoder(old / source)(images), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_an_old_run_resumes_as_if_it_had_not_stopped(old, tmp_path, capsys):
  """Breaks if the recipe of today does not equal that of the old run, or its state means something else."""
  run = tmp_path / 'run'
  shutil.copytree(old / 'moco', run)
  expected = records(run)
  shutil.rmtree(run / 'checkpoints/4')
  command = shlex.split(json.loads((run / 'config.json').read_text())['command'])
  arguments = [a for a in command if a.startswith('--config')]
  assert cli.main(['pretrain', f'--workdir={run}', *arguments]) == 0
  assert f'resuming {run} from step 2 of 4' in capsys.readouterr().out
  resumed = records(run)[-2:]
  assert [r['step'] for r in resumed] == [3, 4]
  for new, before in zip(resumed, expected[-2:]):
    np.testing.assert_allclose(new['loss'], before['loss'], rtol=1e-4)
    np.testing.assert_allclose(new['grad_norm'], before['grad_norm'], rtol=1e-3)
