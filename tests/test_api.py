"""The package as a library: arrays, threads, Ctrl-C, callbacks, history, own code as Python objects."""

import os
import pathlib
import signal
import subprocess
import sys
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from PIL import Image

import simclr_jax as sj
from simclr_jax import data, own_code, plugins
from simclr_jax.data import objects
from simclr_jax.data.ops import op
from simclr_jax.errors import ConfigError
from simclr_jax.evaluate import knn
from simclr_jax.fields import Field
from simclr_jax.validation import Choices, Range

PIXELS = np.random.default_rng(0).integers(0, 256, (96, 32, 32, 3), dtype=np.uint8)
PIXELS[::2, :, :, 0] //= 4  # the even images have little red
KINDS = np.array(['few', 'much'])[np.arange(96) % 2]
SHORT = {**TINY, 'steps': '4', 'data.num_classes': '0'}
WIDTH = 8  # of Small


def train(images=PIXELS, recipe='simclr_digits', **arguments):
  overrides = {**SHORT, **arguments.pop('overrides', {})}
  return sj.pretrain(images, recipe, overrides=overrides, progress=False, **arguments)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


# The names of the package.


def test_importing_the_package_is_fast():
  """Breaks if `import simclr_jax` or `dir` imports JAX or TensorFlow, or a name is offered but not listed."""
  program = (
    'import sys, simclr_jax as sj\n'
    "assert set(sj.__all__) <= set(dir(sj)) and 'pretrain' in sj.__all__\n"
    "assert not {'jax', 'flax', 'tensorflow', 'numpy'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, '-c', program], check=True)
  assert all(hasattr(sj, name) for name in sj.__all__) and set(sj._API) == set(sj.__all__)
  assert (pathlib.Path(sj.__file__).parent / 'py.typed').exists()
  with pytest.raises(AttributeError, match='nothing'):
    sj.nothing  # noqa: B018


def test_names_are_typed(tmp_path):
  """Breaks if a type checker does not know the public names or what `pretrain` returns."""
  program = tmp_path / 'program.py'
  program.write_text(
    'import simclr_jax as sj\n'
    + ''.join(f'reveal_type(sj.{name})\n' for name in sj.__all__)
    + "reveal_type(sj.pretrain('x').history)\n"
  )
  completed = subprocess.run(
    [sys.executable, '-m', 'mypy', '--follow-imports=silent', '--ignore-missing-imports', program],
    capture_output=True,
    text=True,
    check=False,
    cwd=pathlib.Path(__file__).parents[1],
  )
  revealed = [line for line in completed.stdout.splitlines() if 'Revealed type' in line]
  assert len(revealed) == len(sj.__all__) + 1, completed.stdout
  assert not any('"Any"' in line for line in revealed) and 'dict' in revealed[-1]


# Training.


def test_a_run_on_an_array(capfd):
  """Breaks if features, history, callbacks or the kNN accuracy of a run on arrays are wrong, or anything is printed."""
  seen = []

  class Count(sj.Callback):
    def on_epoch(self, epoch, metrics):
      seen.append(('epoch', epoch, metrics['loss']))

  test = PIXELS[64:], KINDS[64:]
  run = train(
    PIXELS[:64],
    labels=KINDS[:64],
    test=test,
    workdir='a run',
    callbacks=[lambda step, metrics: seen.append((step, metrics)), Count()],
    knn_every_epochs=1,
  )
  assert capfd.readouterr().out == ''
  assert isinstance(run, sj.Run) and run.complete and not run.interrupted and run.step == 4
  steps = [s for s, *_ in seen if s != 'epoch']
  assert steps == [1, 2, 3, 4] and [s[1] for s in seen if s[0] == 'epoch'] == [1, 2]
  metrics = [m for s, *rest in seen if s != 'epoch' for m in rest]
  assert all(type(v) is float for m in metrics for v in m.values())
  np.testing.assert_array_equal(run.history['loss'], [m['loss'] for m in metrics])
  assert run.history['step'].dtype == np.int64 and run.history['step'].tolist() == [1, 2, 3, 4]
  assert {len(v) for v in run.history.values()} == {4}
  assert np.isnan(run.history['knn_acc']).tolist() == [True, False, True, False]  # once per epoch
  np.testing.assert_allclose(run.history['epoch'], [0.5, 1, 1.5, 2])
  features = run.encoder(PIXELS)
  assert features.dtype == np.float32 and features.shape == (96, 32)
  number = (KINDS == 'much').astype(int)
  expected = knn.accuracy(features[:64], number[:64], features[64:], number[64:], 5)
  assert run.knn(k=5) == expected == run.knn((PIXELS[:64], KINDS[:64]), test, k=5)
  np.testing.assert_array_equal(sj.load_encoder('a run')(PIXELS), features)
  np.testing.assert_array_equal(sj.load_run('a run').history['loss'], run.history['loss'])
  assert sj.load_encoder(run.export('exported')).digest() == run.encoder.digest()
  np.testing.assert_array_equal(np.load(run.embed('f.npy')), features[:64])
  with pytest.raises(ConfigError, match='trained on images in memory: pass the train images'):
    sj.load_run('a run').knn()


def test_a_run_in_a_thread():
  """Breaks if a training outside the main thread fails, changes signal handlers, or `workdir` must be a Path."""
  handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  runs, during = [], []

  def work():
    callback = [
      lambda *_: during.append([signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)])
    ]
    runs.append(train(workdir=str(pathlib.Path('in a thread')), callbacks=callback))

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert runs and runs[0].complete and during == [handlers] * 4


def interrupt_by_signal(step, metrics):
  if step == 2:
    os.kill(os.getpid(), signal.SIGINT)


def interrupt_by_exception(step, metrics):
  if step == 2:
    raise KeyboardInterrupt


def stop(step, metrics):
  return step == 2


@pytest.mark.parametrize('callback', [interrupt_by_signal, interrupt_by_exception, stop])
def test_an_interrupted_run_is_returned_and_resumes(callback):
  """Breaks if Ctrl-C in a notebook or a callback loses the training, or resuming changes the results."""
  handler = signal.getsignal(signal.SIGINT)
  run = train(workdir='run', callbacks=callback)
  assert run.interrupted and not run.complete and 2 <= run.step < 4
  assert run.encoder(PIXELS[:3]).shape == (3, 32)
  assert 'interrupted' in repr(run) and signal.getsignal(signal.SIGINT) is handler
  resumed = train(workdir=run.workdir)
  assert resumed.complete and resumed.step == 4
  whole = train(workdir='whole')
  np.testing.assert_array_equal(resumed.history['loss'], whole.history['loss'])
  np.testing.assert_array_equal(resumed.encoder(PIXELS), whole.encoder(PIXELS))


def test_an_error_in_a_callback_is_raised():
  """Breaks if a sweep cannot end a run by an exception of its own."""

  def prune(step, metrics):
    raise LookupError('pruned')

  with pytest.raises(LookupError, match='pruned'):
    train(workdir='run', callbacks=[prune])


def test_images_in_memory_are_the_only_ones(monkeypatch):
  """Breaks if other data is read from the disk when the training images are passed, or labels are required."""

  def fail(*_):
    raise AssertionError('the disk was searched')

  monkeypatch.setattr(data, 'load', fail)
  run = train(knn_every_epochs=1)
  assert run.complete and 'knn_acc' not in run.history
  with pytest.raises(ConfigError, match='the training images have no labels'):
    run.knn(PIXELS, PIXELS)


def test_new_folders(monkeypatch):
  """Breaks if a call without a workdir resumes or overwrites another run, or a mistake leaves a folder."""
  with pytest.raises(ConfigError, match="no field 'epoch', did you mean 'epochs'"):
    train(epoch=3)
  assert not os.listdir()
  first, second = train(), train()
  assert [str(first.workdir), str(second.workdir)] == ['runs/images', 'runs/images-2']
  assert first.complete and second.complete


def test_a_recipe_object():
  """Breaks if a recipe of `load_recipe` is not accepted, is changed, or is not checked again before it is used."""
  recipe = sj.load_recipe('simclr_digits', SHORT)
  before = recipe.to_json()
  run = sj.pretrain(recipe, 'runs/digits', progress=False)  # the images of the recipe
  assert run.complete and run.config.data.source == 'digits' and run.config.data.examples == 6000
  assert sj.pretrain(PIXELS, recipe, 'other', batch_size=48, progress=False).config.batch_size == 48
  assert recipe.to_json() == before and recipe.is_locked
  recipe.epochs = 7
  recipe.steps = 0
  with recipe.ignore_type():
    recipe.epochs = 3.5
  with pytest.raises(ConfigError, match='epochs=3.5 is not an integer'):
    sj.pretrain(PIXELS, recipe, 'third', progress=False)


def test_folders(tmp_path):
  """Breaks if a folder of images, as a str or a Path, is not trained on as by the command."""
  for i, image in enumerate(PIXELS[:40]):
    (tmp_path / 'pictures' / KINDS[i]).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(tmp_path / 'pictures' / KINDS[i] / f'{i}.png')
  for place in ('pictures', pathlib.Path('pictures')):
    run = train(place)
    assert run.config.data.source == 'folder' and run.workdir.name.startswith('pictures')
    assert run.encoder('pictures').shape == (40, 32)
  paths = sorted(pathlib.Path('pictures').rglob('*.png'), key=lambda p: int(p.stem))
  np.testing.assert_allclose(run.encoder(paths), run.encoder(PIXELS[:40]), atol=1e-5)
  assert train(paths).complete
  assert 0 <= run.knn('pictures', (PIXELS[40:], KINDS[40:]), k=3) <= 1
  assert sj.load_data('pictures').class_names == ['few', 'much']


def test_arguments_that_do_not_fit():
  """Breaks if a wrong argument gives a traceback instead of a sentence."""
  for arguments, message in (
    ({'data': None}, 'pass images or a recipe'),
    ({'data': 'nowhere'}, 'no such folder or file'),
    ({'data': 'digits', 'labels': KINDS}, 'labels are for images in memory'),
    ({'data': PIXELS, 'labels': KINDS[:3]}, 'labels of shape'),
    ({'data': PIXELS, 'recipe': 'simclr_digit'}, "did you mean 'simclr_digits'"),
    ({'data': PIXELS, 'epochs': 2.5}, 'epochs=2.5 is not an integer'),
    ({'data': PIXELS, 'method': 'mocco'}, "did you mean 'moco'"),
    ({'data': 3}, 'type int are not supported'),
    ({'data': []}, 'there are no images'),
  ):
    with pytest.raises(ConfigError, match=message):
      sj.pretrain(**arguments, progress=False)
  assert not os.listdir()


# Data sets of Python objects.


class Tensor:
  """What is known of a tensor of another library."""

  def __init__(self, array):
    self.array = array

  def __array__(self, dtype=None, copy=None):
    return np.asarray(self.array, dtype)


class Pairs:
  """A data set of PyTorch."""

  def __len__(self):
    return len(PIXELS)

  def __getitem__(self, i):
    if i >= len(self):
      raise IndexError
    return Image.fromarray(PIXELS[i]), np.int64(i % 2)


@pytest.mark.parametrize(
  'images',
  [
    PIXELS,
    jnp.asarray(PIXELS),
    Tensor(PIXELS),
    list(PIXELS),
    tuple(PIXELS),
    [Tensor(x) for x in PIXELS],
    [Image.fromarray(x) for x in PIXELS],
    (PIXELS, KINDS),
    (list(PIXELS), list(KINDS)),
    Pairs(),
    [{'image': x, 'label': k} for x, k in zip(PIXELS, KINDS)],
    (x for x in PIXELS),
  ],
  ids=lambda x: type(x).__name__,
)
def test_kinds_of_images(images):
  """Breaks if the same images are another data set when they come in another container."""
  labelled = isinstance(images, Pairs) or (isinstance(images, tuple) and len(images) == 2)
  labelled |= isinstance(images, list) and isinstance(images[0], dict)
  dataset = objects.dataset(images)
  np.testing.assert_array_equal(dataset.images, PIXELS)
  assert dataset.labelled == labelled
  if labelled:
    np.testing.assert_array_equal(dataset.labels, np.arange(96) % 2)
    assert list(dataset.class_names) in (['few', 'much'], ['0', '1'])


@pytest.mark.parametrize(
  'images, labels, message',
  [
    ([PIXELS[0], PIXELS[1, :16]], None, 'different shapes.*image 1.*resize them'),
    (PIXELS[0], None, r'one image\? save images\[None\]'),
    (PIXELS, np.zeros((96, 2)), 'labels of shape'),
    (['/nowhere/a.png'], None, '/nowhere/a.png is no file'),
    ([{'picture': PIXELS[0]}], None, "no key 'image', only picture"),
    (b'abc', None, 'type bytes are not supported'),
  ],
)
def test_images_of_no_known_kind(images, labels, message):
  """Breaks if images that cannot be used are not named in one sentence."""
  with pytest.raises(ConfigError, match=message):
    objects.dataset(images, labels)


def test_labels_of_any_kind():
  """Breaks if labels are not numbered in sorted order, or test labels are numbered differently."""
  dataset = objects.dataset(PIXELS[:3], [2**40, -7, 2**40])
  assert dataset.labels.tolist() == [1, 0, 1] and list(dataset.class_names) == ['-7', str(2**40)]
  from simclr_jax.api import _same_classes

  bank = objects.dataset(PIXELS[:3], ['b', 'd', 'b'])
  queries = _same_classes(bank, objects.dataset(PIXELS[:4], ['a', 'd', 'b', 'b']))
  assert queries.labels.tolist() == [2, 1, 0, 0]


# Methods, encoders and ops of one's own.

FIELDS = {
  'pull': Field(1.0, 'factor of the loss', Range(0.0, 10.0)),
  'kind': Field('cosine', 'similarity', Choices('cosine', 'dot')),
}


class Small(nn.Module):
  features: int = WIDTH
  dtype: object = jnp.float32

  @nn.compact
  def __call__(self, x, train):
    x = nn.relu(nn.Conv(self.features, (3, 3), (4, 4), dtype=self.dtype)(x))
    return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


def small(config, dtype):
  return Small(2 * WIDTH, dtype)


@op(draws=True, amount=Range(0.0, 1.0))
def darken(key, image, size, amount):
  """Multiplies an image by a number from 1 - amount to 1."""
  return image * (1 - amount * jax.random.uniform(key))


def align(config):
  """Pulls the two views together."""
  from simclr_jax import losses
  from simclr_jax.methods import Method
  from simclr_jax.models import network

  net = network.build(config)

  def init(rng, batch):
    params, stats = net.init(rng, batch['views'][:, 0])
    return params, {'stats': stats}

  def loss(params, state, batch, rng):
    a, stats = net.apply(params, state['stats'], batch['views'][:, 0])
    b, stats = net.apply(params, stats, batch['views'][:, 1])
    z = losses.l2_normalize(jnp.stack([a[-1], b[-1]], axis=1))
    value = -config.pull * jnp.mean(jnp.sum(z[:, 0] * z[:, 1], axis=-1))
    return value, ({'stats': stats}, {'loss': value, 'embeddings': z})

  return Method(init, loss, lambda params, state: network.encoder(params, state['stats']))


@pytest.mark.parametrize('encoder, width', [(Small, 8), (Small(features=4), 4), (small, 16)])
def test_an_encoder_as_an_object(encoder, width):
  """Breaks if a flax module or a function cannot be trained, or another program cannot read the run."""
  run = train(encoder=encoder, workdir='run')
  path = pathlib.Path(run.config.model.encoder)
  assert path.parent == pathlib.Path('run/code').resolve() or path.parent == pathlib.Path(
    'run/code'
  )
  assert run.config.code == (f'model.encoder={plugins.checksum(path, "encoder")}',)
  features = run.encoder(PIXELS[:5])
  assert features.shape == (5, width)
  program = (
    'import numpy as np, simclr_jax as sj\n'
    "np.save('f.npy', sj.load_encoder('run')(np.load('x.npy')))\n"
  )
  np.save('x.npy', PIXELS[:5])
  subprocess.run([sys.executable, '-c', program], check=True)
  np.testing.assert_allclose(np.load('f.npy'), features, atol=1e-6)
  with pytest.raises(ConfigError, match='different configuration.*code'):
    train(encoder=Small(features=5), workdir='run')
  assert train(encoder=encoder, workdir='run').complete


def test_a_method_as_an_object():
  """Breaks if a function is no method, or its fields are lost."""
  run = train(method=align, overrides={'augment.view1': 'simclr_crop(0.5, 1)'}, pull=2.0)
  assert run.complete and run.config.pull == 2.0 and run.config.kind == 'cosine'
  assert 'temperature' not in run.config and run.config.augment.view1 == 'simclr_crop(0.5, 1)'
  assert -2 <= run.history['loss'][-1] <= 2
  with pytest.raises(ConfigError, match='pull=20.0 is out of range: from 0.0 to 10.0'):
    train(method=align, pull=20.0)


def test_a_built_in_method_by_name():
  """Breaks if `method='moco'` needs a recipe of its own."""
  run = train(method='moco', queue_size=64)
  assert run.config.method == 'moco' and run.config.queue_size == 64 and run.complete


def test_ops_as_objects():
  """Breaks if ops of one's own are unknown to the run."""
  view = 'simclr_crop(0.5, 1) | darken(0.5, p=0.5)'
  run = train(ops=[darken], overrides={'augment.view1': view})
  assert run.complete and 'ops_' in run.config.augment.ops


def closure():
  width = 3

  def build(config, dtype):
    return Small(width)

  return build


@pytest.mark.parametrize(
  'kind, value, message',
  [
    ('encoder', closure(), 'uses width, which is not defined at the top level'),
    ('encoder', 3, 'the source of int is not available'),
    ('encoder', eval("type('Made', (), {})"), 'the source of Made is not available'),
    ('ops', small, 'decorate the functions'),
    ('method', Small(), 'neither a function build'),
    ('encoder', type(sys)('no_file'), 'has no file'),
  ],
)
def test_objects_without_usable_source(kind, value, message, tmp_path):
  """Breaks if an object that cannot be written to a file gives a traceback or a broken file."""
  with pytest.raises(ConfigError, match=message):
    own_code.file_of(value, kind, tmp_path / 'code')
  assert not (tmp_path / 'code').exists()


def test_modules_and_paths_are_used_as_they_are(tmp_path):
  """Breaks if an object that has a file is copied."""
  from simclr_jax.methods import end_to_end

  for value in (
    end_to_end,
    end_to_end.build,
    end_to_end.__file__,
    pathlib.Path(end_to_end.__file__),
  ):
    assert own_code.file_of(value, 'method', tmp_path / 'code') == end_to_end.__file__
  assert not (tmp_path / 'code').exists()


@pytest.mark.slow
def test_arrays_of_other_types_keep_the_scale_of_the_training_images():
  """Breaks if 12 bits in uint16 are not scaled, or test images are scaled by their own range."""
  deep = PIXELS.astype(np.uint16) * 16
  run = train(deep)
  low, high = run.config.data.range
  assert (low, high) == (deep.min(), deep.max())
  dark = deep[:8] // 4
  exact = np.floor(np.clip((dark - low) * 255.0 / (high - low), 0, 255) + 0.5).astype(np.uint8)
  np.testing.assert_array_equal(run.encoder(dark), run.encoder(exact))
