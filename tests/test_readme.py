"""The README and the documents, executed as they are written: a new user's first hour."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import SMALL
from PIL import Image

import simclr_jax as sj
from simclr_jax import cli

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
# A new user has one device and no simulated ones.
USER = {**os.environ, 'PATH': f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}'}
DOCUMENTS = {'README.md': 2, 'docs/python.md': 4}  # number of blocks of Python to run in order


def blocks(file, language):
  return re.findall(rf'```{language}\n(.*?)```', (ROOT / file).read_text(), re.DOTALL)


def sequence():
  """The commands of the section on own images, without comments."""
  section = README.split('## Your own images')[1]
  text = re.search(r'```bash\n(.*?)```', section, re.DOTALL)[1]
  return [shlex.split(line, comments=True) for line in text.strip().splitlines()]


def photographs(folder, count=60):
  """A plain class folder of small images: stripes, spots and noise on a ground of random colour."""
  rng = np.random.default_rng(0)
  for i in range(count):
    kind = ('stripes', 'spots', 'noise')[i % 3]
    ground = np.ones((40, 48, 3)) * rng.uniform(40, 160, 3)
    y, x = np.mgrid[:40, :48]
    pattern = {'stripes': np.sin(x * rng.uniform(0.5, 1)) > 0,
               'spots': np.sin(x / 2) * np.sin(y / 2 + rng.uniform(0, 3)) > 0.5,
               'noise': rng.uniform(size=(40, 48)) > 0.5}[kind]  # fmt: skip
    (folder / kind).mkdir(parents=True, exist_ok=True)
    image = (ground + 80 * pattern[..., None]).clip(0, 255).astype(np.uint8)
    Image.fromarray(image).save(folder / kind / f'IMG_{i}.jpg')


def test_the_readme_is_short():
  """Breaks if the README grows into a manual."""
  assert len(README.split()) <= 900


def test_blocks_are_found():
  """Breaks if the tests below run nothing."""
  assert {file: len(blocks(file, 'python')) for file in DOCUMENTS} == DOCUMENTS
  names = [command[1] for command in sequence()]
  assert names == [
    'check-data',
    'pretrain',
    'knn',
    'probe',
    'finetune',
    'report',
    'embed',
    'export',
  ]


def test_the_sequence_on_own_images_in_small(tmp_path, monkeypatch):
  """Breaks if a command of the README fails on a plain class folder; with few steps."""
  monkeypatch.chdir(tmp_path)
  photographs(tmp_path / 'my_photographs')
  shorter = {
    'pretrain': ['--config.steps=2', '--config.warmup_epochs=0', '--config.batch_size=8', '--config.model.width_multiplier=0.125',
                 '--config.tensorboard=false'],
    'finetune': ['--config.steps=2', '--config.batch_size=8', '--seeds=1'],
    'probe': ['--epochs=1'],
  }  # fmt: skip
  for _, *arguments in sequence():
    assert cli.main([*arguments, *shorter.get(arguments[0], [])]) == 0, arguments
  written(tmp_path)


def written(folder):
  """Checks the files that the sequence writes."""
  run = folder / 'runs/my_photographs'
  page = (run / 'report.html').read_text()
  assert 'stripes' in page and 'kNN' in page
  assert np.load(folder / 'features.npz')['features'].shape[0] in (48, 60)
  assert sj.load_encoder(folder / 'my_encoder').digest() == sj.load_encoder(run).digest()
  assert (folder / 'sheet.png').stat().st_size > 1000


@pytest.mark.slow
def test_the_sequence_on_own_images(tmp_path):
  """Breaks if the README's sequence, as it is written, fails on a plain class folder."""
  photographs(tmp_path / 'my_photographs')
  for command in sequence():
    done = subprocess.run(
      command, cwd=tmp_path, env=USER, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
  written(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('file', DOCUMENTS)
def test_python_blocks(file, tmp_path):
  """Breaks if the Python of a document, in order and from an empty folder, fails or prints noise."""
  program = '\n'.join(blocks(file, 'python'))
  done = subprocess.run(
    [sys.executable, '-c', program],
    cwd=tmp_path,
    env=USER,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  noise = [line for line in done.stderr.splitlines() if 'oneDNN' in line or 'Traceback' in line]
  assert not noise
  assert list(tmp_path.glob('runs/*/checkpoints'))


@pytest.mark.slow
def test_python_blocks_in_a_notebook(tmp_path, monkeypatch):
  """Breaks if the README's Python fails under a Jupyter kernel, or shows no progress bar there."""
  nbclient, nbformat = pytest.importorskip('nbclient'), pytest.importorskip('nbformat')
  monkeypatch.chdir(tmp_path)
  cells = [nbformat.v4.new_code_cell(block) for block in blocks('README.md', 'python')]
  cells.append(nbformat.v4.new_code_cell('run'))
  notebook = nbformat.v4.new_notebook(cells=cells)
  nbclient.NotebookClient(notebook, timeout=600, kernel_name='python3').execute()
  outputs = [[o.get('text', '') for o in cell.outputs] for cell in cells]
  assert any('it/s' in text or 'step' in text for text in outputs[0])
  assert 'complete' in str(cells[-1].outputs)


@pytest.mark.slow
def test_interrupting_a_notebook(tmp_path, monkeypatch):
  """Breaks if *Interrupt* in a notebook loses the training, or a class of a cell is no encoder."""
  nbclient, nbformat = pytest.importorskip('nbclient'), pytest.importorskip('nbformat')
  monkeypatch.chdir(tmp_path)
  cells = [
    nbformat.v4.new_code_cell(source)
    for source in (
      'import os, signal, flax.linen as nn, jax.numpy as jnp, numpy as np, simclr_jax as sj\n'
      'images = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), dtype=np.uint8)',
      'class Net(nn.Module):\n'
      '  @nn.compact\n'
      '  def __call__(self, x, train):\n'
      '    return jnp.mean(nn.relu(nn.Conv(8, (3, 3))(x)), axis=(1, 2))\n',
      'def interrupt(step, metrics):\n'
      '  if step == 3:\n'
      '    os.kill(os.getpid(), signal.SIGINT)\n\n'
      "run = sj.pretrain(images, 'simclr_images:cpu', encoder=Net, image_size=16, batch_size=16, epochs=99,\n"
      '                  callbacks=interrupt)',
      'assert run.interrupted and 3 <= run.step < 99 and run.encoder(images).shape == (32, 8)\n'
      "assert os.path.dirname(run.config.model.encoder).endswith('code')",
    )
  ]
  notebook = nbformat.v4.new_notebook(cells=cells)
  nbclient.NotebookClient(notebook, timeout=600, kernel_name='python3').execute()


def test_an_export_without_this_package(tmp_path):
  """Breaks if the network or the crop of docs/export.md gives other features than the encoder."""
  (snippet,) = blocks('docs/export.md', 'python')
  assert 'simclr_jax' not in snippet
  run = sj.pretrain(
    sj.load_recipe('simclr_digits', {**SMALL, 'knn_every_epochs': '0', 'steps': '1'}),
    tmp_path / 'run',
    progress=False,
  )
  run.export(tmp_path / 'my_encoder')
  rng = np.random.default_rng(0)
  images = {
    f'{h}x{w}': rng.integers(0, 256, (3, h, w, 3), dtype=np.uint8)
    for h, w in ((32, 32), (50, 71), (21, 90))
  }
  np.savez(tmp_path / 'images.npz', **images)
  program = (
    snippet + "\nimport numpy as np, sys\nx = np.load('images.npz')\n"
    "np.savez('features.npz', **{name: features(x[name]) for name in x})\n"
    "assert 'simclr_jax' not in sys.modules\n"
  )
  subprocess.run([sys.executable, '-c', program], check=True, cwd=tmp_path)
  for name, features in np.load(tmp_path / 'features.npz').items():
    np.testing.assert_allclose(features, run.encoder(images[name]), atol=1e-5)
