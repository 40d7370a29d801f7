"""Weights for other tools: every format contains the network, and what would not is refused or removed.

The tests of PyTorch, timm and onnxruntime compare with these libraries and skip without them.
"""

import dataclasses
import importlib.util
import json
import os
import pickle
import pickletools
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import TINY, fails
from sklearn.datasets import load_sample_images

from simclr_jax import (
  cli,
  config as recipes,
  encoder as encoders,
  methods,
  optim,
  run_config,
  train_state,
)
from simclr_jax.commands import export as command
from simclr_jax.data import objects
from simclr_jax.encoder import Encoder
from simclr_jax.errors import ConfigError
from simclr_jax.interop import (
  export,
  moco_checkpoint,
  model as models,
  numpy_reader,
  pickles,
  torch_loader,
  torch_names,
)
from simclr_jax.models import classifier, resnet
from simclr_jax.runtime import checkpoint

TORCH = 'make test-interop runs the tests that need PyTorch'
TENSORFLOW = pytest.mark.skipif(
  importlib.util.find_spec('torch') is not None,
  reason='PyTorch and TensorFlow crash in one process: the environment without PyTorch runs this test',
)
PHOTOS = objects.dataset(load_sample_images()['images'])
# Every kind of network; with `small_depths`, of three or four blocks.
NETWORKS = {
  'basic simclr': {'depth': 18, 'stem': 'imagenet'},
  'basic torchvision cifar': {'depth': 18, 'stem': 'cifar', 'variant': 'torchvision', 'normalize': 'cifar10'},
  'basic haiku': {'depth': 18, 'stem': 'imagenet', 'variant': 'haiku', 'normalize': 'imagenet'},
  'basic strided se': {'depth': 8, 'stem': 'strided', 'se_ratio': 0.25},
  'basic sk cifar': {'depth': 18, 'stem': 'cifar', 'sk_ratio': 0.0625},
  'bottleneck torchvision': {'depth': 50, 'stem': 'imagenet', 'variant': 'torchvision', 'normalize': 'imagenet'},
  'bottleneck haiku strided': {'depth': 50, 'stem': 'strided', 'variant': 'haiku'},
  'bottleneck sk': {'depth': 50, 'stem': 'imagenet', 'sk_ratio': 0.0625},
}  # fmt: skip
HEADS = {
  'all': {'head_layers': 3, 'head_dim': 8},
  'none': {'head_layers': 2, 'head_norm': 'none', 'head_dim': 8},
  'hidden': {'head_layers': 2, 'head_norm': 'hidden', 'head_hidden': 24, 'head_dim': 8},
  'all_last_plain': {'head_layers': 2, 'head_norm': 'all_last_plain', 'head_dim': 8},
  'linear': {'head': 'linear', 'head_norm': 'none', 'head_dim': 8},
}


@pytest.fixture
def small_depths(monkeypatch):
  """ResNet-18 and 50 with few blocks, which compile quickly."""
  monkeypatch.setitem(resnet.DEPTHS, 18, ((2, 1, 1), False))
  monkeypatch.setitem(resnet.DEPTHS, 50, ((2, 1), True))


def random(shapes, seed=0):
  """Variables with random values of the size that training gives them: every tensor changes the features."""
  rng = np.random.default_rng(seed)

  def draw(path, x):
    leaf, name = path[-1].key, path[-2].key if len(path) > 1 else ''
    if leaf == 'kernel':
      return rng.normal(0, np.sqrt(1 / np.prod(x.shape[:-1])), x.shape).astype(np.float32)
    if leaf in ('scale', 'var'):
      last = name in ('bn3',) or (name == 'bn2' and path[-3].key.startswith('group'))
      return rng.uniform(0.5, 1.5, x.shape).astype(np.float32) * (0.5 if last else 1)
    return rng.normal(0, 0.2, x.shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def recipe(**fields):
  """A recipe whose network is narrow."""
  values = {'width_multiplier': 0.125, **fields}
  return recipes.load(
    'simclr_images', {'image_size': 32, **{f'model.{k}': v for k, v in values.items()}}
  )


def encoder(channels=3, **fields):
  """An encoder with random weights."""
  architecture = {**recipes.architecture(recipe(**fields)), 'channels': channels}
  return Encoder(architecture, random(encoders.shapes(architecture)), {'step': 3})


def with_projector(**fields):
  """The same with a projection head."""
  e = encoder(**fields)
  return models.with_head(e, random(encoders.head_shapes(e.architecture), seed=1))


def with_classifier(head_layer, **fields):
  """A classifier of five classes on `head_layer` layers of the head."""
  a = {**recipes.architecture(recipe(**fields)), 'classes': 5, 'head_layer': head_layer}
  net = classifier.build(a, 5, head_layer)
  x = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  return Encoder(a, random(jax.eval_shape(net.init, jax.random.key(0), x)))


def write(e, name, out, **arguments):
  """Exports an encoder; returns `verified.json`."""
  return export.write(models.of(e), name, out, PHOTOS, 'two photographs', **arguments)


def images(height, width, channels=3):
  """Random images in [0, 1]."""
  return np.random.default_rng(0).random((2, height, width, channels), np.float32)


def load_module(path):
  """A Python file that an export contains."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


# Every format.


SLOW = ('basic torchvision cifar', 'bottleneck haiku strided', 'hidden', 'linear')


def some(names):
  """Names as parameters, some of them slow."""
  return [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in names]


@pytest.mark.parametrize('name', some(NETWORKS))
def test_the_tensors_give_the_features(name, small_depths, tmp_path):
  """Breaks if a tensor has a wrong name, layout or place, or a network or program is not the encoder's.

  The features are computed in numpy from the tensors in the file.
  """
  out = tmp_path / 'out'
  verified = write(encoder(**NETWORKS[name]), 'safetensors', out)
  assert len(verified['difference']) == 2
  assert all(v['features'] < 5e-6 for v in verified['difference'].values())
  assert json.loads((out / 'verified.json').read_text()) == verified
  files = {'model.safetensors', 'verified.json', 'README.md'}
  needed = name != 'bottleneck torchvision'  # the width needs the program in any case
  assert {p.name for p in out.iterdir()} == files | {'load_torch.py'}
  assert needed == bool(
    torch_loader.obstacle({**encoder(**NETWORKS[name]).architecture, 'width_multiplier': 1})
  )
  program = (out / 'load_torch.py').read_text()
  assert len(program.splitlines()) <= 60
  compile(program, 'load_torch.py', 'exec')


@pytest.mark.parametrize('norm', some(HEADS))
def test_the_projection_head_goes_along(norm, small_depths, tmp_path):
  """Breaks if a projection head is lost, or its layers are written in another order."""
  e = with_projector(depth=8, stem='cifar', **HEADS[norm])
  verified = write(e, 'safetensors', tmp_path / 'out')
  assert all({'features', 'projection'} == v.keys() for v in verified['difference'].values())


@pytest.mark.parametrize('head_layer', [0, 1, 3])
def test_the_classifier_goes_along(head_layer, tmp_path):
  """Breaks if the classifier is lost, or the layers of the head below it are wrong."""
  e = with_classifier(head_layer, depth=8, stem='cifar', head_layers=3)
  verified = write(e, 'safetensors', tmp_path / 'out')
  assert all({'features', 'logits'} == v.keys() for v in verified['difference'].values())


@pytest.mark.parametrize('name', ['stablehlo', pytest.param('savedmodel', marks=TENSORFLOW)])
def test_programs_of_jax(name, tmp_path):
  """Breaks if the program gives other features, or works for one size or one number of images only."""
  e = with_projector(depth=8, stem='cifar')
  try:
    verified = write(e, name, tmp_path / 'out')
  except ConfigError as error:
    if 'too old for programs of jax' not in str(error):
      raise
    assert not (tmp_path / 'out').exists()
    pytest.skip(str(error))
  assert list(verified['difference']) == ['32x32', '33x17']
  assert all({'features', 'projection'} == v.keys() for v in verified['difference'].values())


def test_the_program_of_jax_runs_without_this_package(tmp_path):
  """Breaks if load.py needs simclr_jax or gives other features."""
  e, x = encoder(depth=8, stem='cifar'), images(20, 27)
  write(e, 'stablehlo', tmp_path / 'out')
  np.save(tmp_path / 'x.npy', x)
  program = (
    'import sys, numpy as np\nfrom load import load\n'
    "y = load()(np.load('../x.npy'))['features']\nnp.save('../y.npy', y)\n"
    "assert 'simclr_jax' not in sys.modules\n"
  )
  subprocess.run([sys.executable, '-c', program], check=True, cwd=tmp_path / 'out')
  np.testing.assert_allclose(np.load(tmp_path / 'y.npy'), e.forward(x), rtol=1e-5, atol=1e-6)


OWN = """
import flax.linen as nn
class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.relu(nn.Conv(4, (3, 3), (2, 2))(x))
    return {}
def build(config, dtype):
  return Net()
"""


@pytest.mark.parametrize(
  'last, sizes',
  [('x.mean((1, 2))', ['32x32', '33x33']), ('nn.Dense(6)(x.reshape((x.shape[0], -1)))', ['32x32'])],
)
def test_an_encoder_of_ones_own(last, sizes, tmp_path):
  """Breaks if another network than a ResNet is not exported, or one whose layers need a fixed size."""
  file = tmp_path / 'net.py'
  file.write_text(OWN.replace('{}', last))
  e = encoder(encoder=str(file))
  assert list(write(e, 'stablehlo', tmp_path / 'out')['difference']) == sizes
  with pytest.raises(ConfigError, match='export it as orbax, stablehlo or savedmodel'):
    write(e, 'safetensors', tmp_path / 'torch')
  with pytest.raises(ConfigError, match='use --to=stablehlo'):
    write(e, 'timm', tmp_path / 'torch')
  assert not (tmp_path / 'torch').exists()


def test_an_encoder_for_one_number_of_images(tmp_path):
  """Breaks if code that a program for any number of images cannot contain gives a traceback."""
  file = tmp_path / 'net.py'
  file.write_text(OWN.replace('{}', 'nn.Dense(6)(x.reshape(len(x), -1))'))
  with pytest.raises(ConfigError, match='instead of len') as error:
    write(encoder(encoder=str(file)), 'stablehlo', tmp_path / 'out')
  assert '\n' not in str(error.value)


def test_detectron2_names_and_nothing_executed(tmp_path):
  """Breaks if a name is not detectron2's, or reading the file calls anything but `numpy.ndarray`."""
  e = encoder(depth=50, stem='imagenet', variant='torchvision')
  write(e, 'detectron2', tmp_path / 'out')
  data = (tmp_path / 'out/model.pkl').read_bytes()
  calls = {op[0].name for op in pickletools.genops(data)} & {
    'GLOBAL',
    'STACK_GLOBAL',
    'INST',
    'OBJ',
    'NEWOBJ',
  }
  strings = [arg for op, arg, _ in pickletools.genops(data) if op.name == 'SHORT_BINUNICODE']
  assert calls == {'STACK_GLOBAL'}
  place = next(
    i for i, (op, *_) in enumerate(pickletools.genops(data)) if op.name == 'STACK_GLOBAL'
  )
  assert strings.index('ndarray') == strings.index('numpy') + 1 and place
  assert sum(op.name == 'STACK_GLOBAL' for op, *_ in pickletools.genops(data)) == 1
  content = pickle.loads(data)
  assert content['__author__'] == 'simclr_jax' and content['matching_heuristics'] is True
  names, weights = content['model'].keys(), content['model']
  leaves = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
  expected = {'stem.conv1.weight', *(f'stem.conv1.norm.{leaf}' for leaf in leaves)}
  for group, count in zip((2, 3, 4, 5), (3, 4, 6, 3)):
    for block in range(count):
      for conv in ('conv1', 'conv2', 'conv3', *['shortcut'] * (block == 0)):
        prefix = f'res{group}.{block}.{conv}'
        expected |= {f'{prefix}.weight', *(f'{prefix}.norm.{leaf}' for leaf in leaves)}
  assert names == expected
  assert (
    weights['stem.conv1.weight'].shape == (8, 3, 7, 7)
    and weights['stem.conv1.weight'].flags.writeable
  )


def test_timm_folder(tmp_path):
  """Breaks if timm would preprocess images in another way, or the model card lacks what the run knows."""
  e = encoder(
    depth=18, stem='imagenet', variant='torchvision', normalize='imagenet', width_multiplier=1
  )
  e.provenance['images'] = {'images': 1200, 'place': 'flowers', 'fingerprint': 1}
  write(e, 'timm', tmp_path / 'out', license='cc-by: "4.0"\n', results=['kNN 71.0 [68.0, 74.0]'])
  config = json.loads((tmp_path / 'out/config.json').read_text())
  assert (config['architecture'], config['num_classes'], config['num_features']) == (
    'resnet18',
    0,
    512,
  )
  cfg = config['pretrained_cfg']
  assert cfg['mean'] == [0.485, 0.456, 0.406] and cfg['std'] == [0.229, 0.224, 0.225]
  assert (cfg['crop_pct'], cfg['interpolation'], cfg['input_size']) == (
    0.875,
    'bicubic',
    [3, 32, 32],
  )
  card = (tmp_path / 'out/README.md').read_text()
  head = card.split('---')[1]
  assert 'library_name: timm\n' in head and 'pipeline_tag: image-feature-extraction' in head
  assert r'license: "cc-by: \"4.0\"\\x0a"' in head
  for text in ('kNN 71.0 [68.0, 74.0]', '1,200, flowers', 'step: 3', 'local-dir:', 'method=simclr'):
    assert text in card or text == 'method=simclr'


REFUSED = [
  ('timm', {'stem': 'imagenet', 'depth': 50}, 'variant simclr.*load_torch.py'),
  ('timm', {'stem': 'cifar', 'depth': 50, 'variant': 'torchvision', 'width_multiplier': 1}, 'cifar stem'),
  ('timm', {'stem': 'imagenet', 'depth': 50, 'variant': 'torchvision'}, 'width 0.125'),
  ('timm', {'stem': 'imagenet', 'depth': 8, 'variant': 'torchvision'}, 'depth 8'),
  ('timm', {'stem': 'imagenet', 'depth': 50, 'sk_ratio': 0.0625}, 'selective kernels'),
  ('huggingface', {'stem': 'imagenet', 'depth': 50, 'se_ratio': 0.25}, 'squeeze and excitation'),
  ('detectron2', {'stem': 'imagenet', 'depth': 50, 'variant': 'haiku'}, 'variant haiku'),
  ('detectron2', {'stem': 'imagenet', 'depth': 200, 'variant': 'torchvision'}, 'depth 200'),
  ('detectron2', {'stem': 'imagenet', 'depth': 34, 'variant': 'torchvision'}, 'width 0.125'),
  ('moco', {'stem': 'cifar', 'depth': 18, 'variant': 'torchvision', 'width_multiplier': 1}, 'cifar stem'),
]  # fmt: skip


@pytest.mark.parametrize('name, fields, expected', REFUSED)
def test_what_no_class_computes_is_refused(name, fields, expected, tmp_path):
  """Breaks if weights are written that the tool loads without an error and computes otherwise."""
  with pytest.raises(ConfigError, match=expected):
    write(encoder(**fields), name, tmp_path / 'out')
  assert not list(tmp_path.iterdir())


# Verification.


def damaged(model):
  """The network with one changed value."""
  variables = jax.tree.map(np.array, model.variables)
  leaf = variables['encoder']['params']['group2_block1']['conv1']['kernel']
  leaf.flat[7] = np.nextafter(leaf.flat[7], np.float32(9))
  return dataclasses.replace(model, variables=variables)


def other_padding(model):
  return dataclasses.replace(model, architecture={**model.architecture, 'variant': 'torchvision'})


TV = {'variant': 'torchvision', 'stem': 'imagenet', 'depth': 18}


@pytest.mark.parametrize(
  'name, fields, change, expected',
  [
    ('safetensors', {}, damaged, 'group2_block1|layer2.0.conv1.weight differs'),
    ('timm', {**TV, 'width_multiplier': 1}, damaged, 'layer2.0.conv1.weight differs'),
    ('detectron2', {**TV, 'depth': 50}, damaged, 'layer2.0.conv1.weight differs'),
    ('stablehlo', {}, damaged, 'group2_block1/conv1/kernel differs'),
    pytest.param('savedmodel', {}, damaged, 'group2_block1/conv1/kernel differs', marks=TENSORFLOW),
    ('stablehlo', {'stem': 'imagenet', 'variant': 'haiku'}, other_padding, 'features .* differ by'),
  ],
)
def test_a_wrong_file_fails_the_export(name, fields, change, expected, tmp_path, monkeypatch):
  """Breaks if a file with one changed bit, or a program with other padding, is kept."""
  target = export.module(name)
  original = target.write
  monkeypatch.setattr(target, 'write', lambda model, folder: original(change(model), folder))
  with pytest.raises(OSError, match=expected) as error:
    write(encoder(**{'depth': 8, 'stem': 'cifar', **fields}), name, tmp_path / 'out')
  assert '\n' not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'name, file', [('safetensors', 'model.safetensors'), ('stablehlo', 'model.stablehlo')]
)
def test_a_truncated_file_fails_the_export(name, file, tmp_path, monkeypatch):
  """Breaks if a file that was not written to its end is kept, or gives a traceback."""
  target = export.module(name)
  original = target.write

  def truncated(model, folder):
    result = original(model, folder)
    os.truncate(folder / file, (folder / file).stat().st_size // 2)
    return result

  monkeypatch.setattr(target, 'write', truncated)
  with pytest.raises(OSError, match='cannot read it back'):
    write(encoder(depth=8, stem='cifar'), name, tmp_path / 'out')
  assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
  """Breaks if an interrupted export leaves a folder."""

  def interrupted(model, folder):
    raise KeyboardInterrupt

  monkeypatch.setattr(export.module('safetensors'), 'read', interrupted)
  with pytest.raises(KeyboardInterrupt):
    write(encoder(depth=8, stem='cifar'), 'safetensors', tmp_path / 'out')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'stem, wrong',
  [
    ('imagenet', 'same_pool'),
    ('imagenet', 'same_conv'),
    ('strided', 'same_conv'),
    ('cifar', 'same_conv'),
  ],
)
def test_wrong_padding_shows_at_one_of_the_sizes(stem, wrong, small_depths):
  """Breaks if all sizes of the comparison hide the padding."""
  tensors = models.of(encoder(depth=18, stem=stem)).tensors()
  _, stride, pool = resnet.STEMS[stem]
  layout = numpy_reader.Layout(stride, pool, False, False, [0.0] * 3, [1.0] * 3)
  differences = []
  for size in export.SIZES[stem]:
    right, other = (
      numpy_reader.outputs(tensors, which, images(*size))[0]
      for which in (layout, dataclasses.replace(layout, **{wrong: True}))
    )
    differences.append(np.abs(right - other).max() / np.abs(right).max())
  assert max(differences) > 1e-3, differences


# The command.


def save_run(workdir, config, state):
  """Writes a run that has trained to `state`."""
  workdir.mkdir()
  run_config.write(workdir, config, {'command': 'simclr-jax pretrain --config=simclr_digits'})
  with checkpoint.Saver(workdir / 'checkpoints', 1) as saver:
    saver.save(int(state.step), state, {'config': config.to_dict(), 'versions': {'jax': '1'}})
  return workdir


def initial_state(config):
  """Optimizer and initial state of a recipe."""
  method = methods.build(config)
  optimizer = optim.build(config, optim.schedule(config, config.data.examples))
  state = jax.jit(
    lambda: train_state.create(method, optimizer, 0, config.image_size, config.data.channels)
  )()
  return optimizer, state


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """The workdir of a run, untrained."""
  config = recipes.load('simclr_digits', {**TINY, 'model.stem': 'cifar', 'data.examples': 6000})
  _, state = initial_state(config)
  return save_run(tmp_path_factory.mktemp('export') / 'run', config, state)


def test_command(run, tmp_path, capsys):
  """Breaks if a run is not exported with its projection head, or its export is not exported again."""
  out = tmp_path / 'out'
  arguments = ['export', f'--workdir={run}', '--to=safetensors', '--with=projector']
  assert cli.main([*arguments, f'--out={out}']) == 0
  text = capsys.readouterr().out
  assert 'at 32x32 pixels, relative difference: features' in text and 'load_torch.py' in text
  assert json.loads((out / 'verified.json').read_text())['images'] == 'training images of the run'
  assert 'simclr-jax pretrain --config=simclr_digits' in (out / 'README.md').read_text()
  before = sorted(p.name for p in out.iterdir())
  assert 'exists already' in fails(capsys, *arguments, f'--out={out}')
  assert before == sorted(p.name for p in out.iterdir())

  orbax = tmp_path / 'orbax'
  assert cli.main(['export', f'--workdir={run}', '--with=projector', f'--out={orbax}']) == 0
  again = ['export', f'--workdir={orbax}', '--to=safetensors', '--with=projector']
  assert cli.main([*again, f'--out={tmp_path / "again"}']) == 0
  name = 'model.safetensors'
  same = export.module('safetensors').safetensors.load_file
  for key, x in same(out / name).items():
    np.testing.assert_array_equal(x, same(tmp_path / 'again' / name)[key])


@pytest.mark.parametrize(
  'arguments, expected',
  [
    (['--to=pickle'], 'invalid choice'),
    (['--to=moco'], 'needs a run of method=moco'),
    (['--to=moco', '--with=projector'], 'no effect with --to=moco'),
    (['--to=timm'], 'use --to=safetensors'),
    (['--to=safetensors', '--with=classifier'], 'fine-tune it first'),
    (['--to=orbax', '--with=classifier'], 'no classifier'),
    (['--to=orbax', '--images=digits'], '--images has no effect'),
    (['--license=mit'], '--license has no effect'),
    (['--to=safetensors', '--images=nowhere'], 'nowhere'),
    (['--to=safetensors', '--config.model.depth=18'], 'only data.* may be overridden'),
  ],
)
def test_wrong_options(run, tmp_path, capsys, arguments, expected):
  """Breaks if an option that cannot be obeyed is ignored, or the message does not name it."""
  error = fails(capsys, 'export', f'--workdir={run}', *arguments, f'--out={tmp_path / "out"}')
  assert expected in error
  assert not (tmp_path / 'out').exists()


def test_onnx_names_the_missing_package(run, tmp_path, capsys, monkeypatch):
  """Breaks if the error without onnx does not say what to install."""
  monkeypatch.setitem(sys.modules, 'onnxruntime', None)
  monkeypatch.setitem(sys.modules, 'onnx', None)
  error = fails(capsys, 'export', f'--workdir={run}', '--to=onnx', f'--out={tmp_path / "out"}')
  assert "pip install 'simclr_jax[onnx]'" in error


def test_help_lists_every_format():
  """Breaks if a format has no line in the help, or the command does not offer it."""
  assert set(command.FORMATS) == {'orbax', *export.MODULES}
  lines = [line.split()[0] for line in command.__doc__.splitlines() if line.startswith('  ')]
  assert lines == list(command.FORMATS)


# The other libraries themselves.

REAL = {
  **NETWORKS,
  'wide': {'depth': 18, 'stem': 'imagenet', 'width_multiplier': 2},
  'resnet200': {'depth': 200, 'stem': 'imagenet'},
  'se': {'depth': 50, 'stem': 'imagenet', 'se_ratio': 0.0625},
  'five channels': {'depth': 18, 'stem': 'strided', 'channels': 5},
  'projector': {'depth': 18, 'stem': 'imagenet', 'head_layers': 3, 'head_dim': 8},
  'as it is': {'depth': 18, 'stem': 'imagenet', 'variant': 'torchvision', 'width_multiplier': 1, 'normalize': 'imagenet'},
}  # fmt: skip


def torch_outputs(model, e, x):
  """The outputs of a network of PyTorch for images x `[n, h, w, c]` in [0, 1]."""
  import torch

  mean, std = models.normalization(e.architecture)
  x = ((x - np.float32(mean)) / np.float32(std)).transpose(0, 3, 1, 2)
  with torch.no_grad():
    return model(torch.from_numpy(np.ascontiguousarray(x, np.float32))).numpy()


def assert_equal(found, wanted):
  np.testing.assert_array_less(np.abs(found - wanted).max() / np.abs(wanted).max(), 1e-5)


@pytest.mark.parametrize('name', REAL)
def test_load_torch(name, tmp_path):
  """Breaks if load_torch.py, or the program of the card, gives other features than the encoder at any parity of sizes."""
  pytest.importorskip('torch', reason=TORCH)
  fields = REAL[name]
  e = with_projector(**fields) if 'head_layers' in fields else encoder(**fields)
  model = models.of(e)
  target, out = export.module('safetensors'), tmp_path / 'out'
  out.mkdir()
  target.write(model, out)
  if (out / 'load_torch.py').exists():
    net = load_module(out / 'load_torch.py').load()
    assert len((out / 'load_torch.py').read_text().splitlines()) <= 40
  else:
    scope = {}
    exec(
      target.usage(model).replace("'model.safetensors'", repr(str(out / 'model.safetensors'))),
      scope,
    )
    net = scope['model']
  for h, w in ((64, 64), (65, 47), (66, 49)):
    x = images(h, w, fields.get('channels', 3))
    assert_equal(torch_outputs(net, e, x), model.outputs(x)[model.top or 'features'])


@pytest.mark.parametrize('depth, classes', [(18, 0), (50, 0), (18, 5)])
def test_timm_loads_the_folder(depth, classes, tmp_path):
  """Breaks if timm does not load the folder as it is, gives other features or preprocesses in another way."""
  timm = pytest.importorskip('timm', reason=TORCH)
  fields = {
    'depth': depth,
    'stem': 'imagenet',
    'variant': 'torchvision',
    'width_multiplier': 1,
    'normalize': 'cifar10',
  }
  e = with_classifier(0, **fields) if classes else encoder(**fields)
  write(e, 'timm', tmp_path / 'out')
  net = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
  about = timm.data.resolve_model_data_config(net)
  assert (tuple(about['mean']), tuple(about['std'])) == resnet.NORMALIZE['cifar10']
  assert (tuple(about['input_size']), about['crop_pct'], about['interpolation']) == (
    (3, 32, 32),
    0.875,
    'bicubic',
  )
  for size in ((64, 64), (65, 47)):
    x = images(*size)
    assert_equal(
      torch_outputs(net, e, x), models.of(e).outputs(x)['logits' if classes else 'features']
    )


@pytest.mark.parametrize('name', REAL)
def test_onnx(name, tmp_path):
  """Breaks if onnxruntime computes other features, also with another number of images."""
  onnxruntime = pytest.importorskip('onnxruntime', reason=TORCH)
  fields = REAL[name]
  e = with_projector(**fields) if 'head_layers' in fields else encoder(**fields)
  write(e, 'onnx', tmp_path / 'out')
  session = onnxruntime.InferenceSession(str(tmp_path / 'out/model.onnx'))
  x = images(66, 49, fields.get('channels', 3))[:1]
  for output, found in zip(
    session.get_outputs(), session.run(None, {'images': x.transpose(0, 3, 1, 2)})
  ):
    assert_equal(found, models.of(e).outputs(x)[output.name])


def test_onnx_padding_fails_the_export(tmp_path, monkeypatch):
  """Breaks if a graph with the pooling of another variant is kept."""
  pytest.importorskip('onnxruntime', reason=TORCH)
  target = export.module('onnx')
  original = target.write
  monkeypatch.setattr(target, 'write', lambda model, folder: original(other_padding(model), folder))
  monkeypatch.setattr(target, 'check_weights', lambda found, wanted: None)
  with pytest.raises(OSError, match='differ by'):
    write(encoder(depth=50, stem='imagenet'), 'onnx', tmp_path / 'out')
  assert not list(tmp_path.iterdir())


def moco_run(workdir, **fields):
  """A run of MoCo with momentum: the configuration, its optimizer, its state and the next gradient."""
  config = recipes.load('moco_cifar10', {
    'model.depth': 18, 'model.stem': 'imagenet', 'model.variant': 'torchvision', 'queue_size': 64, 'image_size': 32,
    'data.examples': 6000, 'data.source': 'digits', 'optimizer': 'sgd', 'weight_decay': 0.01, 'weight_decay_on': 'all',
    'batch_size': 32, 'model.bn_groups': 1, 'knn_every_epochs': 0, 'data.train_split': 'train', 'data.test_split': 'test',
    'model.head_norm': 'none', **fields,
  })  # fmt: skip
  optimizer, state = initial_state(config)
  rng = np.random.default_rng(0)

  def gradient():
    return jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), state.params)

  for _ in range(2):
    updates, opt_state = optimizer.update(gradient(), state.opt_state, state.params)
    params = jax.tree.map(np.add, state.params, updates)
    state = state.replace(params=params, opt_state=opt_state, step=state.step + 1)
  queue = {**state.state['queue'], 'pointer': np.int32(40)}
  state = state.replace(
    state={**state.state, 'queue': queue}, step=np.int32(375)
  )  # 2 epochs of 187.5 steps
  state = jax.tree.map(jax.numpy.asarray, state)
  save_run(workdir, config, state)
  return config, optimizer, state, gradient()


def moco_file(workdir, out):
  arguments = ['export', f'--workdir={workdir}', '--to=moco', f'--out={out}']
  assert cli.main(arguments) == 0
  return out / 'model.pth.tar'


def r18_names(fc):
  """The state_dict of torchvision's ResNet-18, in order, as main_moco.py saves it; True: a parameter."""
  norm = {
    'weight': True,
    'bias': True,
    'running_mean': False,
    'running_var': False,
    'num_batches_tracked': False,
  }
  names = {'conv1.weight': True} | {f'bn1.{k}': v for k, v in norm.items()}
  for layer in (1, 2, 3, 4):
    for block in (0, 1):
      p = f'layer{layer}.{block}'
      for i in (1, 2):
        names |= {f'{p}.conv{i}.weight': True} | {f'{p}.bn{i}.{k}': v for k, v in norm.items()}
      if layer > 1 and block == 0:
        names |= {f'{p}.downsample.0.weight': True} | {
          f'{p}.downsample.1.{k}': v for k, v in norm.items()
        }
  return names | {f'fc.{i}{leaf}': True for i in fc for leaf in ('weight', 'bias')}


@pytest.mark.parametrize(
  'head, fc',
  [('mlp', ('0.', '2.')), pytest.param('linear', ('',), marks=pytest.mark.slow)],
)
def test_moco_checkpoint(head, fc, tmp_path):
  """Breaks if names, order, queue, epoch or momentum are not those of facebookresearch/moco."""
  config, _, state, _ = moco_run(tmp_path / 'run', **{'model.head': head, 'model.head_layers': 2})
  file = pickles.read(moco_file(tmp_path / 'run', tmp_path / 'out'))
  names = r18_names(fc)
  expected = [f'module.encoder_{k}.{name}' for k in 'qk' for name in names]
  assert list(file['state_dict']) == ['module.queue', 'module.queue_ptr', *expected]
  assert (file['epoch'], file['arch']) == (2, 'resnet18')
  tensors = file['state_dict']
  np.testing.assert_array_equal(tensors['module.queue'], np.asarray(state.state['queue']['rows']).T)
  assert (
    tensors['module.queue_ptr'].tolist() == [40] and tensors['module.queue_ptr'].dtype == np.int64
  )
  learned = [name for name, is_parameter in names.items() if is_parameter]
  assert file['optimizer']['param_groups'][0]['params'] == list(range(2 * len(learned)))
  buffers = file['optimizer']['state']
  assert list(buffers) == list(range(len(learned)))
  for i, name in enumerate(learned):
    assert buffers[i]['momentum_buffer'].shape == tensors[f'module.encoder_q.{name}'].shape, name


@pytest.mark.parametrize(
  'fields, expected',
  [
    ({'variant': 'simclr'}, 'variant simclr'),
    ({'head_norm': 'hidden'}, 'without BatchNorm'),
    ({'head_hidden': 99}, 'one or two linear layers'),
    ({'head_layers': 3}, 'one or two linear layers'),
  ],
)
def test_what_moco_cannot_load_is_refused(fields, expected):
  """Breaks if a checkpoint is written whose names main_moco.py does not have."""
  mocos = {'depth': 18, 'stem': 'imagenet', 'variant': 'torchvision', 'head_norm': 'none'}
  e = with_projector(**{**mocos, 'width_multiplier': 1, **fields})
  with pytest.raises(ConfigError, match=expected):
    moco_checkpoint.check(models.of(e))


def test_what_sgd_did_not_train_is_refused():
  """Breaks if the state of another optimizer is written as the momentum of SGD."""
  config = recipes.load('moco_cifar10', {'optimizer': 'lars'})
  with pytest.raises(ConfigError, match='needs optimizer=sgd'):
    moco_checkpoint.training(config, None, 0.1)


def test_a_moco_training_goes_on_in_pytorch(tmp_path):
  """Breaks if PyTorch's SGD, from the file, takes another step than our optimizer."""
  torch = pytest.importorskip('torch', reason=TORCH)
  torchvision = pytest.importorskip('torchvision', reason=TORCH)
  config, optimizer, state, gradient = moco_run(
    tmp_path / 'run', **{'model.head': 'mlp', 'model.head_layers': 2}
  )
  checkpoint = torch.load(moco_file(tmp_path / 'run', tmp_path / 'out'), weights_only=True)

  def network():
    net = torchvision.models.resnet18(num_classes=config.model.head_dim)
    net.fc = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), net.fc)
    return net

  moco = torch.nn.Module()
  moco.encoder_q, moco.encoder_k = network(), network()
  moco.register_buffer('queue', torch.zeros(config.model.head_dim, 64))
  moco.register_buffer('queue_ptr', torch.zeros(1, dtype=torch.long))
  model = torch.nn.Module()
  model.module = moco
  assert list(model.state_dict()) == list(checkpoint['state_dict'])
  model.load_state_dict(checkpoint['state_dict'])
  sgd = torch.optim.SGD(model.parameters(), 1.0)
  sgd.load_state_dict(checkpoint['optimizer'])
  rate = optim.schedule(config, config.data.examples)
  sgd.param_groups[0]['lr'] = float(rate(2))  # the optimizer has taken two steps

  a = recipes.architecture(config)
  names = {'encoder': torch_names.encoder(a), 'head': torch_names.head(a, 512)}
  parameters = dict(moco.encoder_q.named_parameters())

  def tensors(tree):
    found = {}
    for part, prefix in (('encoder', ''), ('head', 'fc.')):
      own = [name for name in names[part] if name.path[0] == 'params']
      found |= torch_names.to_torch(own, {'params': tree[part]}, prefix)
    return found

  for name, x in tensors(gradient).items():
    parameters[name].grad = torch.from_numpy(x.copy())
  sgd.step()
  updates, _ = optimizer.update(gradient, state.opt_state, state.params)
  for name, x in tensors(jax.tree.map(np.add, state.params, updates)).items():
    np.testing.assert_allclose(parameters[name].detach().numpy(), x, rtol=1e-5, atol=1e-7)
