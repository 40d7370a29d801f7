"""Weights of google-research/simclr, compared with the network written in TensorFlow as the papers describe it."""

import shutil

import jax
import numpy as np
import pytest
import tensorflow as tf

from simclr_jax.errors import ConfigError
from simclr_jax.interop import tf_checkpoints, weights
from simclr_jax.models.mlp import MLP
from simclr_jax.models.resnet import ResNet

v1 = tf.compat.v1
BASIC, BOTTLENECK = (2, 2, 2, 2), (3, 4, 6, 3)


class Builder:
  """Builds SimCLR's network in a graph of TensorFlow 1; variables are numbered as they are created.

  `names` of convolutions and BatchNorm layers are formats of the number with its underscore.
  """

  def __init__(self, prefix='', names=('base_model/conv2d{}', 'base_model/batch_normalization{}')):
    self.prefix, self.names = prefix, names
    self.rng, self.counts, self.arrays = np.random.default_rng(len(prefix)), [0, 0], {}

  def variable(self, name, shape):
    fan_in = np.prod(shape[:-1]) or 1
    positive = name.endswith(('gamma', 'variance'))
    x = self.rng.uniform(0.5, 1.5, shape) if positive else self.rng.normal(0, 1, shape)
    scale = 1 if positive else fan_in**-0.5 if name.endswith('kernel') else 0.2
    self.arrays[self.prefix + name] = (scale * x).astype(np.float32)
    return tf.constant(self.arrays[self.prefix + name])

  def layer(self, kind):
    number = self.counts[kind]
    self.counts[kind] += 1
    return self.names[kind].format(f'_{number}' if number else '')

  def conv(self, x, filters, size, stride=1, bias=False):
    name = self.layer(0)
    kernel = self.variable(f'{name}/kernel', (size, size, x.shape[-1], filters))
    if stride > 1:
      x = self.pad(x, (size - 1) // 2, size - 1 - (size - 1) // 2)
    x = tf.nn.conv2d(x, kernel, stride, 'SAME' if stride == 1 else 'VALID')
    return x + self.variable(f'{name}/bias', (filters,)) if bias else x

  def pad(self, x, before, after):
    return tf.pad(x, [[0, 0], [before, after], [before, after], [0, 0]])

  def norm(self, x, relu=True, name=None, center=True):
    name, c = name or self.layer(1), (x.shape[-1],)
    gamma = self.variable(f'{name}/gamma', c)
    beta = self.variable(f'{name}/beta', c) if center else 0
    mean, var = (self.variable(f'{name}/moving_{m}', c) for m in ('mean', 'variance'))
    x = (x - mean) / tf.sqrt(var + 1e-5) * gamma + beta
    return tf.nn.relu(x) if relu else x

  def block(self, x, f, stride, first, bottleneck, sk, se):
    shortcut, out = x, 4 * f if bottleneck else f
    if first:
      if sk:
        shortcut = self.pad(shortcut, 0, 1) if stride > 1 else shortcut
        shortcut = tf.nn.avg_pool2d(shortcut, 2, stride, 'SAME' if stride == 1 else 'VALID')
      shortcut = self.norm(self.conv(shortcut, out, 1, 1 if sk else stride), relu=False)
    if not bottleneck:
      x = self.norm(self.conv(x, f, 3, stride))
      x = self.norm(self.conv(x, f, 3), relu=False)
    else:
      x = self.norm(self.conv(x, f, 1))
      x = self.norm(self.conv(x, 2 * f if sk else f, 3, stride))
      if sk:
        streams = tf.stack(tf.split(x, 2, -1))
        y = tf.reduce_mean(tf.reduce_sum(streams, 0), [1, 2], keepdims=True)
        y = self.conv(self.norm(self.conv(y, max(int(f * sk), 32), 1)), 2 * f, 1)
        x = tf.reduce_sum(streams * tf.nn.softmax(tf.stack(tf.split(y, 2, -1)), 0), 0)
      x = self.norm(self.conv(x, out, 1), relu=False)
    if se:
      y = tf.reduce_mean(x, [1, 2], keepdims=True)
      y = tf.nn.relu(self.conv(y, max(int(f * se), 1), 1, bias=True))
      x = x * tf.sigmoid(self.conv(y, out, 1, bias=True))
    return tf.nn.relu(x + shortcut)

  def encoder(self, x, blocks, width, cifar, bottleneck, sk=0, se=0):
    if cifar:
      x = self.norm(self.conv(x, width, 3))
    else:
      if sk:
        x = self.norm(self.conv(x, width // 2, 3, 2))
        x = self.conv(self.norm(self.conv(x, width // 2, 3)), width, 3)
      else:
        x = self.conv(x, width, 7, 2)
      x = tf.nn.max_pool2d(self.norm(x), 3, 2, 'SAME')
    for group, count in enumerate(blocks):
      for block in range(count):
        stride = 2 if group and not block else 1
        x = self.block(x, width * 2**group, stride, not block, bottleneck, sk, se)
    return tf.reduce_mean(x, [1, 2])

  def head(self, h, dims, scope='head_contrastive/nl_{}'):
    for i, dim in enumerate(dims):
      name, last = scope.format(i), i == len(dims) - 1
      h = h @ self.variable(f'{name}/dense/kernel', (h.shape[-1], dim))
      h = self.norm(h, not last, f'{name}/batch_normalization', center=not last)
    return h

  def classifier(self, h, classes):
    kernel, bias = (
      self.variable(f'head_supervised/linear_layer/dense/{leaf}', shape)
      for leaf, shape in (('kernel', (h.shape[-1], classes)), ('bias', (classes,)))
    )
    return h @ kernel + bias


def images(size, n=2):
  """Noise with another mean colour in every image, so that their features differ."""
  rng = np.random.default_rng(7)
  return rng.normal(rng.normal(size=(n, 1, 1, 3)), 1, (n, size, size - 1, 3)).astype(np.float32)


def save(prefix, arrays):
  """Writes a checkpoint of TensorFlow 1."""
  prefix.parent.mkdir(parents=True, exist_ok=True)
  with tf.Graph().as_default(), v1.Session() as session:
    for name, x in arrays.items():
      v1.get_variable(name, initializer=x, use_resource=False)
    session.run(v1.global_variables_initializer())
    v1.train.Saver().save(session, str(prefix), write_state=False)
  return prefix


def slots(arrays):
  """The variables of momentum SGD."""
  trained = {
    n: x for n, x in arrays.items() if not n.startswith('ema_model/') and 'moving' not in n
  }
  return {f'{name}/Momentum': np.zeros_like(x) for name, x in trained.items()}


STEP = {'global_step': np.int64(250228)}


def build(size=32, prefix='', heads=(), classes=0, **settings):
  """(arrays by name, images, features, projection, logits) of a network with random numbers."""
  builder, x = Builder(prefix), images(size)
  h = builder.encoder(tf.constant(x), **settings)
  z = builder.head(h, heads)
  logits = builder.classifier(h, classes) if classes else None
  return builder.arrays, x, h.numpy(), z.numpy(), np.array(logits)


TINY = {'blocks': BASIC, 'width': 4, 'cifar': True, 'bottleneck': False}


def features(network, x):
  net = ResNet(**{k: v for k, v in network.model.items() if not k.startswith('head')})
  return np.asarray(jax.jit(lambda v, x: net.apply(v, x, train=False))(network.encoder, x))


def assert_close(ours, theirs, tolerance=1e-5):
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * abs(theirs).max())


R18 = {'depth': 18, 'variant': 'simclr', 'sk_ratio': 0.0, 'se_ratio': 0.0}


@pytest.mark.parametrize(
  'size, settings, model',
  [
    (16, TINY, R18 | {'stem': 'cifar', 'width_multiplier': 1 / 16}),
    (33, TINY | {'cifar': False, 'width': 8}, R18 | {'stem': 'imagenet', 'width_multiplier': 1 / 8}),
    (35, TINY | {'cifar': False, 'width': 8, 'sk': 0.0625},
     R18 | {'stem': 'imagenet', 'width_multiplier': 1 / 8, 'sk_ratio': 0.0625}),
    (16, TINY | {'blocks': BOTTLENECK, 'se': 0.5},
     R18 | {'depth': 34, 'stem': 'cifar', 'width_multiplier': 1 / 16, 'se_ratio': 0.5}),
    (48, {'blocks': BOTTLENECK, 'width': 16, 'cifar': False, 'bottleneck': True},
     R18 | {'depth': 50, 'stem': 'imagenet', 'width_multiplier': 0.25}),
    (49, {'blocks': BOTTLENECK, 'width': 16, 'cifar': False, 'bottleneck': True, 'sk': 0.0625},
     R18 | {'depth': 50, 'stem': 'imagenet', 'width_multiplier': 0.25, 'sk_ratio': 0.0625}),
  ],
  ids=['r18-cifar', 'r18', 'r18-sk', 'r34-se', 'r50', 'r50-sk'],
)  # fmt: skip
def test_encoder(tmp_path, size, settings, model):
  """Breaks if a variable goes to another layer, or the network pads or pools in another way than SimCLR's."""
  arrays, x, h, _, _ = build(size, **settings)
  prefix = save(tmp_path / 'model.ckpt-225206', arrays | slots(arrays) | STEP)
  [network] = weights.networks(prefix, {})
  assert network.model == model
  assert (network.name, network.head, network.classifier) == ('', None, None)
  assert (network.normalize, network.notes) == ('none', ())
  assert np.std(h, axis=0).mean() > 1e-3 * abs(h).max()  # the features of the images differ
  assert_close(features(network, x), h)


@pytest.mark.parametrize('depth, sk, convolutions', [
  (18, False, 21), (34, False, 37), (50, False, 53), (101, False, 104), (152, False, 155), (200, False, 203),
  (50, True, 87), (101, True, 172), (152, True, 257),
])  # fmt: skip
def test_number_of_layers(depth, sk, convolutions):
  """Breaks if a network has another number of convolutions than in the published files."""
  convs, norms = tf_checkpoints._order(depth, sk, sk, False)
  expand = sum(path[-1] == 'expand' for path in convs)  # the only ones without BatchNorm
  assert (len(convs), len(norms) + expand) == (convolutions, convolutions)
  shapes = jax.eval_shape(
    lambda: ResNet(depth, sk_ratio=0.0625 * sk).init(jax.random.key(0), images(32), train=False)
  )
  flat = jax.tree_util.tree_leaves_with_path(shapes['params'])
  assert sum(path[-1].key == 'kernel' for path, _ in flat) == convolutions


def test_base_ema_heads_and_classifier(tmp_path):
  """Breaks if variables of the EMA network and of the base network are mixed, or those of a head go elsewhere."""
  heads = (32, 32, 7)
  base, x, h, z, logits = build(heads=heads, classes=5, **TINY)
  ema, _, ema_h, ema_z, _ = build(prefix='ema_model/', heads=heads, **TINY)
  save(
    tmp_path / 'model.ckpt-250228', base | ema | slots(base) | STEP | {'beta1_power': np.float32(1)}
  )
  found = {network.name: network for network in weights.networks(tmp_path, {})}
  assert set(found) == {'base', 'ema'}
  for name, expected_h, expected_z in (('base', h, z), ('ema', ema_h, ema_z)):
    network = found[name]
    assert_close(features(network, x), expected_h)
    fields = {'head': 'mlp', 'head_layers': 3, 'head_hidden': 0, 'head_dim': 7, 'head_norm': 'all'}
    assert network.model.items() >= fields.items()
    outputs = MLP(3, 7).apply(network.head, expected_h, train=False)
    assert_close(outputs[-1], expected_z)
    assert any('beta1_power' in note for note in network.notes)
    assert 'the checkpoint is model.ckpt-250228, the newest in the folder' in network.notes
  assert_close(h @ found['base'].classifier['kernel'] + found['base'].classifier['bias'], logits)
  assert found['ema'].classifier is None
  assert any('trained during pretraining' in note for note in found['base'].notes)
  assert weights.load(tmp_path, {}, 'ema').name == 'ema'
  with pytest.raises(ConfigError, match='choose one of base, ema'):
    weights.load(tmp_path, {})


def test_fine_tuned(tmp_path):
  """Breaks if a fine-tuned network loses its head or its classifier, or the doubt about its input is not told."""
  arrays, _, _, _, _ = build(heads=(32, 32, 7), classes=5, **TINY)
  trained = {k: v for k, v in arrays.items() if not k.startswith('head_contrastive')}
  prefix = save(tmp_path / 'model.ckpt-751', arrays | slots(trained) | STEP)
  [network] = weights.networks(prefix, {})
  np.testing.assert_array_equal(
    network.head['params']['dense1']['kernel'], arrays['head_contrastive/nl_0/dense/kernel']
  )
  assert network.classifier['kernel'].shape == (32, 5)
  assert 'the first layer of the projection head after fine-tuning' in network.notes[-1]
  supervised = {k: v for k, v in arrays.items() if not k.startswith('head_contrastive')}
  [network] = weights.networks(save(tmp_path / 'supervised' / 'model.ckpt-1', supervised), {})
  assert network.head is None and network.classifier is not None and network.notes == ()


@pytest.mark.parametrize('dims, scope, fields', [
  ((7,), 'head_contrastive/l_{}', {'head': 'linear', 'head_layers': 1, 'head_dim': 7, 'head_hidden': 0}),
  ((24, 7), 'head_contrastive/nl_{}', {'head': 'mlp', 'head_layers': 2, 'head_dim': 7, 'head_hidden': 24}),
])  # fmt: skip
def test_other_heads(tmp_path, dims, scope, fields):
  """Breaks if a linear head, or a head of another width than the features, computes something else."""
  builder = Builder()
  h = builder.encoder(tf.constant(images(16)), **TINY)
  z = builder.head(h, dims, scope)
  [network] = weights.networks(save(tmp_path / 'model.ckpt-9', builder.arrays), {})
  assert network.model.items() >= fields.items()
  net = MLP(len(dims), 7, fields['head_hidden'])
  assert_close(net.apply(network.head, h.numpy(), train=False)[-1], z.numpy())


def test_paths(tmp_path):
  """Breaks if a file of the checkpoint does not name it, or another checkpoint of the folder is taken."""
  arrays, _, _, _, _ = build(16, **TINY)
  name = 'base_model/conv2d/kernel'
  for step in (9, 80, 700):
    save(tmp_path / f'model.ckpt-{step}', arrays | {name: np.full_like(arrays[name], step)})

  def step(path):
    [network] = weights.networks(path, {})
    return network.encoder['params']['stem_conv']['kernel'].max(), network.notes

  for ending in ('', '.index', '.data-00000-of-00001', '.meta'):
    assert step(tmp_path / f'model.ckpt-80{ending}') == (80, ())
  assert step(tmp_path) == (700, ('the checkpoint is model.ckpt-700, the newest in the folder',))
  state = 'model_checkpoint_path: "{}"\nall_model_checkpoint_paths: "model.ckpt-700"\n'
  (tmp_path / 'checkpoint').write_text(state.format('/cns/somewhere/model.ckpt-9'))
  assert step(tmp_path) == (9, ('the checkpoint is model.ckpt-9, which the file checkpoint names',))
  (tmp_path / 'checkpoint').write_text(state.format('model.ckpt-8'))
  assert step(tmp_path)[0] == 700


@pytest.fixture(scope='module')
def tiny():
  """Variables of a network with all parts."""
  arrays, *_ = build(16, heads=(32, 7), classes=3, **TINY)
  return arrays


CONV, BN = 'base_model/conv2d_12/kernel', 'base_model/batch_normalization_12/gamma'
HEAD, CLASSIFIER = 'head_contrastive/nl_0/dense/kernel', 'head_supervised/linear_layer/dense/kernel'


@pytest.mark.parametrize('change, message', [
  (lambda a: a.pop(CONV), '20 convolutions and 21 BatchNorm layers are no ResNet'),
  (lambda a: a.pop(BN), 'lacks params/group3_block1/bn1/scale'),
  (lambda a: a.update({CONV: a[CONV][:1]}), 'conv2d_12/kernel is .* instead of'),
  (lambda a: a.update({CONV: a[CONV] * np.nan}), 'conv2d_12/kernel has values that are not finite'),
  (lambda a: a.update({CONV: a[CONV].astype(np.int32)}), 'conv2d_12/kernel has no floating-point numbers'),
  (lambda a: a.update({CONV.replace('12', '99'): a[CONV]}), '22 convolutions and 21 BatchNorm layers are no ResNet'),
  (lambda a: a.update({CONV.replace('kernel', 'bias'): a[BN]}), '21 convolutions and 21 BatchNorm layers are'),
  (lambda a: a.update({'base_model/dense/kernel': a[HEAD]}), 'base_model/dense/kernel is no variable of a ResNet'),
  (lambda a: a.pop(HEAD), 'layers of the projection head head_contrastive are missing'),
  (lambda a: a.update({HEAD: a[HEAD][1:]}), 'nl_0/dense/kernel is .31, 32. instead of .32, 32.'),
  (lambda a: a.update({'head_contrastive/nl_1/batch_normalization/beta': a[BN][:7]}), 'also has head_contrastive/nl_1'),
  (lambda a: a.update({CLASSIFIER: a[CLASSIFIER][1:]}), 'has shapes .31, 3. and .3,., not of 32 features'),
  (lambda a: [a.pop(k) for k in list(a) if k.startswith('base_model')], 'kernels of its convolutions are missing'),
  (lambda a: [a.update({f'resnet50/{k}': a.pop(k)}) for k in list(a)], 'contains no network.*only resnet50/base'),
])  # fmt: skip
def test_other_networks_are_refused(tmp_path, tiny, change, message):
  """Breaks if a file of another network is read, or refused without naming what is wrong."""
  arrays = dict(tiny)
  change(arrays)
  with pytest.raises(ConfigError, match=message) as error:
    weights.networks(save(tmp_path / 'model.ckpt-1', arrays), {})
  assert str(tmp_path) in str(error.value) and '\n' not in str(error.value)


def flip(path, place):
  data = bytearray(path.read_bytes())
  data[int(place * len(data))] ^= 16
  path.write_bytes(data)


def truncate(path, part=0.5):
  path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])


DATA, INDEX = 'model.ckpt-1.data-00000-of-00001', 'model.ckpt-1.index'


@pytest.mark.parametrize('change, message', [
  (lambda d: truncate(d / DATA), 'is damaged: its data is shorter'),
  (lambda d: truncate(d / DATA, 0.8), 'is damaged: Read less bytes'),
  (lambda d: flip(d / DATA, 0.0), 'is damaged: .*[Cc]hecksum'),
  (lambda d: truncate(d / INDEX), 'is damaged'),
  (lambda d: flip(d / INDEX, 0.5), 'is damaged'),
  (lambda d: (d / INDEX).unlink(), 'model.ckpt-1.index does not exist'),
  (lambda d: (d / DATA).unlink(), 'data-00000-of-00001 does not exist: copy all files'),
  (lambda d: (d / DATA).write_bytes(b''), 'data-00000-of-00001 is empty'),
  (lambda d: (d / INDEX).write_bytes(b'version https://git-lfs.github.com/spec/v1\n'), 'pointer of Git LFS'),
  (lambda d: (d / INDEX).write_bytes(b'no table of TensorFlow'), 'is damaged'),
])  # fmt: skip
def test_damages(tmp_path, tiny, change, message):
  """Breaks if a damaged checkpoint is read, or an error of TensorFlow reaches the user."""
  prefix = save(tmp_path / 'model.ckpt-1', tiny | slots(tiny))
  change(tmp_path)
  with pytest.raises(ConfigError, match=message) as error:
    tf_checkpoints.networks(prefix, {})
  assert '\n' not in str(error.value) and len(str(error.value)) < 500


def test_folder_without_checkpoint(tmp_path):
  """Breaks if a folder of other files ends with a traceback."""
  (tmp_path / 'readme.txt').write_text('')
  with pytest.raises(
    ConfigError, match='contains no checkpoint of TensorFlow: no file ends in .index'
  ):
    tf_checkpoints.networks(tmp_path, {})


# SavedModels.


def tf2_name(name):
  """The name that Keras gave a variable of TensorFlow 1."""
  parts = name.split('/')
  if parts[0] == 'base_model':
    if parts[1].startswith('conv2d'):
      return f'resnet/conv2d_fixed_padding{parts[1][6:]}/{parts[1]}/{parts[2]}'
    return f'resnet/batch_norm_relu{parts[1][19:]}/sync_{parts[1]}/{parts[2]}'
  if parts[0] == 'head_supervised':
    return f'head_supervised/linear_layer/dense_3/{parts[-1]}'
  i = int(parts[1][3:])
  if parts[2] == 'dense':
    return f'projection_head/{parts[1]}/dense_{i}/kernel'
  return f'projection_head/{parts[1]}/batch_norm_relu_{21 + i}/sync_batch_normalization_{21 + i}/{parts[3]}'


class Layer(tf.Module):
  """A node in the graph of objects."""


def save_model(folder, arrays, names=tf2_name):
  """Writes a SavedModel with a function that uses all variables."""
  module = tf.Module()
  module.model = Layer()
  module.model.layers = []
  for name, x in arrays.items():
    layer = Layer()
    setattr(layer, 'a.b', tf.Variable(x, name=names(name)))  # '.' is escaped in the keys
    module.model.layers.append(layer)
  module.variables_list = [getattr(layer, 'a.b') for layer in module.model.layers]
  module.step = tf.Variable(7, name='global_step')

  @tf.function(input_signature=[tf.TensorSpec([], tf.float32)])
  def call(x):
    return tf.add_n([x * tf.reduce_sum(v) for v in module.variables_list])

  module.call = call
  tf.saved_model.save(module, str(folder))
  return folder


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """(folder of a SavedModel, its variables, images, features, projection)."""
  arrays, x, h, z, _ = build(16, heads=(32, 7), classes=3, **TINY)
  shuffled = dict(sorted(arrays.items(), key=lambda item: item[0][::-1]))
  return save_model(tmp_path_factory.mktemp('saved') / 'model', shuffled), arrays, x, h, z


def test_saved_model(saved, monkeypatch):
  """Breaks if a variable of a SavedModel goes to another layer, or the SavedModel is run."""
  folder, arrays, x, h, z = saved
  monkeypatch.setattr(tf.saved_model, 'load', None)
  for path in (folder, folder / 'saved_model.pb', folder / 'variables'):
    [network] = weights.networks(path, {})
    assert (
      network.model.items()
      >= {'depth': 18, 'stem': 'cifar', 'head_layers': 2, 'head_dim': 7}.items()
    )
    assert network.normalize == 'none'
  assert_close(features(network, x), h)
  assert_close(MLP(2, 7).apply(network.head, h, train=False)[-1], z)
  name = 'head_supervised/linear_layer/dense/kernel'
  np.testing.assert_array_equal(network.classifier['kernel'], arrays[name])


def test_hub_module(tmp_path, tiny):
  """Breaks if a SavedModel of TensorFlow 1 is not read, whose variables have the names of a checkpoint."""
  with tf.Graph().as_default(), v1.Session() as session:
    for name, x in tiny.items():
      v1.get_variable(name, initializer=x, use_resource=False)
    session.run(v1.global_variables_initializer())
    builder = v1.saved_model.Builder(str(tmp_path / 'hub'))
    builder.add_meta_graph_and_variables(session, [])
    builder.save()
  [network] = weights.networks(tmp_path / 'hub', {})
  np.testing.assert_array_equal(
    network.encoder['params']['stem_conv']['kernel'], tiny['base_model/conv2d/kernel']
  )


@pytest.mark.parametrize('change, message', [
  (lambda d: truncate(d / 'saved_model.pb'), 'saved_model.pb is damaged'),
  (lambda d: (d / 'saved_model.pb').write_bytes(b'\x08\x01'), 'saved_model.pb is damaged'),
  (lambda d: (d / 'saved_model.pb').unlink(), 'without the names of its variables: give the folder of the SavedModel'),
  (lambda d: (d / 'variables/variables.index').unlink(), 'variables.index does not exist'),
])  # fmt: skip
def test_damaged_saved_models(saved, tmp_path, change, message):
  """Breaks if a damaged SavedModel is read, or an error of TensorFlow reaches the user."""
  folder = shutil.copytree(saved[0], tmp_path / 'copy')
  change(folder)
  with pytest.raises(ConfigError, match=message):
    weights.networks(folder, {})


def test_saved_models_of_other_networks(tmp_path, tiny):
  """Breaks if two networks in one SavedModel are mixed, or one without names of layers is read."""
  kernels = {name: x for name, x in tiny.items() if name.endswith('kernel')}
  folder = save_model(tmp_path / 'short', kernels, lambda name: 'kernel')
  with pytest.raises(ConfigError, match='contains several variables kernel: only one network'):
    weights.networks(folder, {})
  twice = {f'{i}/{name}': x for i in '01' for name, x in kernels.items()}
  folder = save_model(tmp_path / 'two', twice, lambda name: f'net_{name[0]}/{tf2_name(name[2:])}')
  with pytest.raises(ConfigError, match='contains several variables .*: only one network'):
    weights.networks(folder, {})
