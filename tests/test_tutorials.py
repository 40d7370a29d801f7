"""The tutorials: notebooks are those of the scripts, run in small form, and BYOL's loss is that of its paper."""

import importlib.util
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

TUTORIALS = pathlib.Path(__file__).parents[1] / 'docs/tutorials'
nbformat = pytest.importorskip('nbformat')
pytest.importorskip('jupytext')
spec = importlib.util.spec_from_file_location('render', TUTORIALS / 'render.py')
render = importlib.util.module_from_spec(spec)
spec.loader.exec_module(render)


@pytest.mark.parametrize('name', render.NAMES)
def test_notebook_is_that_of_the_script(name, monkeypatch):
  """Breaks if a script was changed without `make tutorials`, or a notebook was edited or has no outputs."""
  monkeypatch.delenv('PROJECT_URL', raising=False)
  saved = nbformat.read(TUTORIALS / f'{name}.ipynb', 4)
  expected = render.notebook(name)
  assert [(c.cell_type, c.source) for c in saved.cells] == [
    (c.cell_type, c.source) for c in expected.cells
  ]
  outputs = [o for c in saved.cells if c.cell_type == 'code' for o in c.outputs]
  assert any('image/png' in o.get('data', {}) for o in outputs)
  assert not any(o.output_type == 'error' for o in outputs)
  assert (TUTORIALS / f'{name}.ipynb').stat().st_size < 400_000


@pytest.mark.slow
@pytest.mark.parametrize('name', render.NAMES)
def test_tutorial_runs_in_small_form(name, monkeypatch):
  import nbclient

  monkeypatch.setenv('SIMCLR_JAX_TUTORIAL', 'small')
  monkeypatch.setenv('PATH', f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}')
  nbclient.NotebookClient(render.notebook(name), timeout=600).execute()


def method():
  """The function `byol` of the tutorial: the cell that defines it, in a namespace of its own."""
  cells = [c.source for c in render.notebook('byol').cells if c.cell_type == 'code']
  namespace = {}
  exec('\n'.join(c for c in cells if 'import simclr_jax' in c or 'def byol' in c), namespace)
  return namespace


def test_byol_is_at_most_60_lines_and_has_the_published_loss():
  """Breaks if the loss is not the sum of 2 - 2 cos over both directions, or the target gets a gradient."""
  from simclr_jax import fields

  namespace = method()
  (cell,) = [c.source for c in render.notebook('byol').cells if 'def byol' in c.source]
  assert len(cell.splitlines()) <= 60
  config = fields.recipe('simclr')
  config.model.depth, config.model.width_multiplier, config.model.head_dim = 8, 0.0625, 6
  config.image_size, config.model.stem = 8, 'cifar'
  with config.unlocked():
    config.key_momentum, config.predictor = 0.9, 'none'
  byol = namespace['byol'](config)
  views = jnp.asarray(np.random.default_rng(0).random((8, 2, 8, 8, 3)), jnp.float32)
  batch = {'views': views, 'step': 0, 'steps': 10}
  params, state = jax.jit(byol.init)(jax.random.key(0), batch)
  (value, (_, metrics)), grads = jax.jit(jax.value_and_grad(byol.loss, has_aux=True))(
    params, state, batch, None
  )
  # Without a predictor and before the first update, online and target network are equal, so both directions compare z1
  # with z2. The last embeddings are (online of view 2, target of view 1).
  z2, z1 = np.asarray(metrics['embeddings'], np.float64).transpose(1, 0, 2)
  cosine = np.sum(z1 * z2, axis=1) / np.linalg.norm(z1, axis=1) / np.linalg.norm(z2, axis=1)
  np.testing.assert_allclose(value, 2 * np.mean(2 - 2 * cosine), rtol=1e-5)
  assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
