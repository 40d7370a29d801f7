"""`simclr-jax import`, `init_from` of files of other programs, and trainings of MoCo that go on."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import TINY, fails

from simclr_jax import cli, config, encoder, runs
from simclr_jax.interop import orbax, pickles, torch_files, torch_names
from simclr_jax.runtime import checkpoint

MODEL = {'depth': 18, 'width_multiplier': 0.125, 'stem': 'cifar', 'variant': 'torchvision'}
HEAD = {'head': 'mlp', 'head_layers': 2, 'head_dim': 16, 'head_norm': 'none'}
FIELDS = {f'--config.model.{name}={value}' for name, value in (MODEL | HEAD).items()}


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  """An npz file with 64 training images of 16 x 16 pixels and 32 test images, with labels."""
  rng = np.random.default_rng(0)
  folder = tmp_path_factory.mktemp('images')
  for split, count in (('train', 64), ('test', 32)):
    pixels = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / f'{split}.npz', images=pixels, labels=np.arange(count) % 4)
  return folder / 'train.npz'


@pytest.fixture(scope='module')
def network():
  """An encoder and a head with random weights and running averages: (architecture, encoder, head)."""
  recipe = config.load(
    'simclr_images', {'image_size': 16, **{f'model.{k}': v for k, v in (MODEL | HEAD).items()}}
  )
  architecture = config.architecture(recipe)
  rng = np.random.default_rng(1)

  def random(shapes):
    return jax.tree.map(
      lambda x: rng.uniform(0.5, 1.5, x.shape).astype(np.float32) / x.shape[0] ** 0.5, shapes
    )

  return (
    architecture,
    random(encoder.shapes(architecture)),
    random(encoder.head_shapes(architecture)),
  )


@pytest.fixture(scope='module')
def weights(network, tmp_path_factory):
  """A file with the names of MoCo, without its queue."""
  architecture, variables, head = network
  tensors = torch_names.to_torch(torch_names.encoder(architecture), variables, 'module.encoder_q.')
  tensors |= torch_names.to_torch(torch_names.head(architecture, 64), head, 'module.encoder_q.fc.')
  path = tmp_path_factory.mktemp('weights') / 'moco.safetensors'
  safetensors.numpy.save_file(tensors, path)
  return path


@pytest.fixture(scope='module')
def imported(weights, tmp_path_factory):
  """The folder that `simclr-jax import` writes."""
  out = tmp_path_factory.mktemp('imported') / 'encoder'
  assert (
    cli.main(
      [
        'import',
        str(weights),
        f'--out={out}',
        '--stem=cifar',
        '--image-size=16',
        '--normalize=cifar10',
      ]
    )
    == 0
  )
  return out


def test_an_import_is_an_export(imported, network, images):
  """Breaks if an imported encoder has other weights, another architecture or other features than its source."""
  architecture, variables, head = network
  loaded = runs.load_encoder(imported)
  own = {**MODEL, **HEAD, 'normalize': 'cifar10', 'image_size': 16}
  assert {name: loaded.architecture[name] for name in own} == own
  for found, wanted in (
    (loaded.variables, variables),
    (orbax.load_head(imported, loaded.architecture), head),
  ):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found, wanted)))
  views = np.random.default_rng(2).uniform(size=(4, 16, 16, 3)).astype(np.float32)
  expected = encoder.Encoder({**architecture, 'normalize': 'cifar10'}, variables).forward(views)
  np.testing.assert_array_equal(loaded.forward(views), expected)


def test_commands_on_an_import(imported, images, capsys, tmp_path):
  """Breaks if kNN, the probe, fine-tuning, embeddings or the report do not work on imported weights."""
  for name, *arguments in (
    ('knn', '--k=5'),
    ('probe', '--protocol=logistic', '--labels=2', '--draws=1'),
    (
      'finetune',
      '--labels=2',
      '--config.steps=2',
      '--config.batch_size=8',
      '--no-baselines',
      '--config.head_layer=1',
    ),
    ('report',),
    ('embed', f'--out={tmp_path / "h.npy"}'),
  ):
    assert cli.main([name, f'--workdir={imported}', f'--data={images}', *arguments]) == 0, name
  results = json.loads((imported / 'evaluation.json').read_text())
  assert {'knn', 'finetune'} <= {name.split('@')[0] for name in results}
  page = (imported / 'report.html').read_text()
  assert 'moco.safetensors' in page and 'Unfinished' not in page
  assert np.load(tmp_path / 'h.npy').shape == (64, 64)
  capsys.readouterr()
  for name in ('knn', 'probe', 'finetune', 'report'):
    assert '--data=DATASET' in fails(capsys, name, f'--workdir={imported}')


def test_out_and_in_again(imported, tmp_path):
  """Breaks if weights, head, architecture or preprocessing change on the way through a PyTorch file."""
  arguments = ['--to=safetensors', '--with=projector', f'--out={tmp_path / "out"}']
  assert cli.main(['export', f'--workdir={imported}', *arguments]) == 0
  assert cli.main(['import', str(tmp_path / 'out'), f'--out={tmp_path / "in"}']) == 0
  before, after = runs.load_encoder(imported), runs.load_encoder(tmp_path / 'in')
  assert after.digest() == before.digest()
  assert after.architecture == before.architecture
  heads = (orbax.load_head(folder, before.architecture) for folder in (imported, tmp_path / 'in'))
  assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *heads)))


def test_pretraining_from_a_file(weights, network, images, tmp_path, capsys):
  """Breaks if init_from of a file of another program does not start from its encoder and head."""
  arguments = [
    'pretrain', '--config=simclr_digits', f'--data={images}', f'--workdir={tmp_path / "run"}', *FIELDS,
    *(f'--config.{k}={v}' for k, v in {**TINY, 'steps': 1, 'learning_rate': 0, 'image_size': 16}.items()
      if not k.startswith('model')),
  ]  # fmt: skip
  assert cli.main([*arguments, f'--config.init_from={weights}']) == 0
  assert 'with its projection head' in capsys.readouterr().out
  _, variables, head = network
  state, _ = checkpoint.load_tree(next((tmp_path / 'run/checkpoints').iterdir()))
  for part, wanted in (('encoder', variables), ('head', head)):
    assert all(
      jax.tree.leaves(jax.tree.map(np.array_equal, state['params'][part], wanted['params']))
    )
  other = [a for a in arguments if 'depth' not in a and 'workdir' not in a]
  message = fails(
    capsys,
    *other,
    f'--workdir={tmp_path / "x"}',
    f'--config.init_from={weights}',
    '--config.model.depth=8',
  )
  assert 'another network' in message
  other = [a for a in arguments if 'variant' not in a and 'workdir' not in a]
  message = fails(capsys, *other, f'--workdir={tmp_path / "y"}', f'--config.init_from={weights}')
  assert '--config.model.variant=torchvision' in message


@pytest.mark.parametrize('arguments, message', [
  (['{weights}', '--out={imported}', '--stem=cifar'], 'exists already'),
  (['{weights}', '--out=x'], 'stem'),
  (['{weights}', '--out=x', '--stem=imagenet'], 'stem'),
  (['{weights}', '--out=x', '--stem=cifar', '--network=encoder_k'], 'one network only'),
  (['{weights}', '--out=x', '--stem=cifar', '--ema'], 'ema'),
  (['{weights}', '--out=x', '--stem=cifar', '--ema', '--network=encoder_q'], 'choose one'),
  (['{weights}x', '--out=x'], 'no such file'),
  (['{folder}', '--out=x'], '{folder}'),
  (['{imported}', '--out=x'], 'exported encoder already'),
  (['/dev/null', '--out=x'], 'no regular file'),
  (['gs://bucket/weights.pth', '--out=x'], 'local folder'),
  (['{weights}', '--out=x', '--stem=cifar', '--image-size=4'], 'image_size=4'),
])  # fmt: skip
def test_wrong_arguments(arguments, message, weights, imported, tmp_path, monkeypatch, capsys):
  """Breaks if a wrong argument is a traceback, has no clear message or leaves a folder."""
  monkeypatch.chdir(tmp_path)
  places = {'weights': weights, 'imported': imported, 'folder': tmp_path}
  stderr = fails(capsys, 'import', *(a.format(**places) for a in arguments))
  assert message.format(**places) in stderr and stderr.count('\n') <= 1, stderr
  assert not (tmp_path / 'x').exists()


@pytest.fixture(scope='module')
def moco(images, tmp_path_factory):
  """The arguments of a MoCo run of two epochs, 9 steps."""
  fields = {
    **TINY, **{f'model.{k}': v for k, v in (MODEL | HEAD).items()},
    'steps': 0, 'epochs': 2, 'batch_size': 16, 'image_size': 16, 'queue_size': 48, 'model.bn_groups': 2, 'learning_rate': 0.3,
    'checkpoint_every_steps': 4, 'data.num_classes': 0, 'keep_checkpoints': 3,
  }  # fmt: skip
  return [
    'pretrain', '--config=moco_cifar10', f'--data={images}', *(f'--config.{k}={v}' for k, v in fields.items())
  ]  # fmt: skip


@pytest.mark.slow
def test_a_training_of_moco_goes_on(moco, tmp_path, monkeypatch):
  """Breaks if a run that starts from an exported checkpoint of MoCo after one epoch is not the uninterrupted run."""
  # MoCo's own classes are too large for a quick test.
  monkeypatch.setattr(torch_files, 'check_class', lambda *args, **kwargs: None)
  whole, first, rest = tmp_path / 'whole', tmp_path / 'first', tmp_path / 'rest'
  assert cli.main([*moco, f'--workdir={whole}']) == 0
  shutil.copytree(whole, first)
  shutil.rmtree(first / 'checkpoints/8')
  shutil.rmtree(first / 'checkpoints/9')
  for path, out in ((first, 'after_1'), (whole, 'after_2')):
    assert cli.main(['export', f'--workdir={path}', '--to=moco', f'--out={tmp_path / out}']) == 0
  file = next((tmp_path / 'after_1').glob('*.pth.tar'))
  start = [f'--config.init_from={file}', '--config.init_network=encoder_q']
  assert cli.main([*moco, f'--workdir={rest}', *start, '--config.init_state=true']) == 0
  a, b = (checkpoint.load_tree(run / 'checkpoints/9')[0] for run in (whole, rest))
  found = dict(jax.tree_util.tree_leaves_with_path(b))
  for path, x in jax.tree_util.tree_leaves_with_path(a):
    if "['probe']" not in jax.tree_util.keystr(path):  # a MoCo checkpoint has no online probe
      np.testing.assert_allclose(
        np.float64(found[path]), x, rtol=1e-5, atol=1e-6, err_msg=str(path)
      )
  assert cli.main(['export', f'--workdir={rest}', '--to=moco', f'--out={tmp_path / "again"}']) == 0
  again, wanted = (
    pickles.read(next((tmp_path / n).glob('*.pth.tar'))) for n in ('again', 'after_2')
  )
  assert (
    list(again['state_dict']) == list(wanted['state_dict'])
    and again['epoch'] == wanted['epoch'] == 2
  )
  # Without the state, the queue and the schedule start anew.
  assert cli.main([*moco, f'--workdir={tmp_path / "anew"}', *start]) == 0
  other = checkpoint.load_tree(tmp_path / 'anew/checkpoints/9')[0]
  assert not np.allclose(other['state']['queue']['rows'], a['state']['queue']['rows'])


@pytest.mark.parametrize('changes, message', [
  (['init_state=true'], 'init_from'),
  (['init_state=true', 'init_from={weights}'], 'no queue'),
  (['init_state=true', 'init_from={imported}'], 'no checkpoint of MoCo'),
])  # fmt: skip
def test_a_training_that_cannot_go_on(changes, message, moco, weights, imported, tmp_path, capsys):
  """Breaks if init_state without the state of a training of MoCo is ignored or a traceback."""
  places = {'weights': weights, 'imported': imported}
  fields = [f'--config.{change.format(**places)}' for change in changes]
  assert message in fails(capsys, *moco, f'--workdir={tmp_path / "run"}', *fields)
