"""Pickles of BYOL, compared with its network written with SAME padding."""

import collections
import io
import os
import pickle
import sys
import types

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from simclr_jax.errors import ConfigError
from simclr_jax.interop import haiku, weights
from simclr_jax.models.mlp import MLP
from simclr_jax.models.resnet import ResNet

STATE = ('online_params', 'target_params', 'online_state', 'target_state', 'opt_state')


class FlatMapping(collections.UserDict):
  """Pickled like Haiku's."""

  def __reduce__(self):
    return type(self), (dict(self.data),)


@pytest.fixture
def modules(monkeypatch):
  """The classes in the pickles of BYOL, in modules with the right names."""
  named_tuple = collections.namedtuple
  found = types.SimpleNamespace()
  for module, values in {
    'byol.byol_experiment': [named_tuple('_ByolExperimentState', STATE)],
    'byol.utils.optimizers': [named_tuple('ScaleByLarsState', ['mu'])],
    'dill._dill': [_create_namedtuple, _create_array],
    'haiku._src.data_structures': [FlatMapping],
  }.items():
    for i, _ in enumerate(parts := module.split('.'), 1):
      monkeypatch.setitem(sys.modules, '.'.join(parts[:i]), types.SimpleNamespace())
    for value in values:
      monkeypatch.setattr(value, '__module__', module)
      setattr(sys.modules[module], value.__name__, value)
      setattr(found, value.__name__, value)
  return found


class Byol:
  """Builds BYOL's network; `params` and `state` are named as by Haiku."""

  def __init__(self, seed):
    self.rng, self.params, self.state = np.random.default_rng(seed), {}, {}

  def variable(self, module, name, shape):
    if name == 'scale':
      x = self.rng.uniform(0.5, 1.5, shape)
    else:
      x = self.rng.normal(0, (np.prod(shape[:-1]) or 1) ** -0.5 if name == 'w' else 0.2, shape)
    self.params.setdefault(module, {})[name] = x.astype(np.float32)
    return self.params[module][name]

  def conv(self, name, x, filters, size, stride=1):
    kernel = self.variable(name, 'w', (size, size, x.shape[-1], filters))
    layer = nn.Conv(filters, (size, size), (stride, stride), padding='SAME', use_bias=False)
    return layer.apply({'params': {'kernel': kernel}}, x)

  def norm(self, name, x):
    shape = (1,) * (x.ndim - 1) + x.shape[-1:]
    values = []
    for moment, low in (('mean', -0.5), ('var', 0.5)):
      average = self.rng.uniform(low, low + 1, shape).astype(np.float32)
      self.state[f'{name}/~/{moment}_ema'] = {
        'average': average, 'hidden': 0.3 * average, 'counter': np.array(7, np.int32)
      }  # fmt: skip
      values.append(average)
    scale, offset = (self.variable(name, leaf, shape) for leaf in ('scale', 'offset'))
    return (x - values[0]) / np.sqrt(values[1] + 1e-5) * scale + offset

  def encoder(self, x, blocks, bottleneck, width, root):
    x = (x - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    x = self.conv(f'{root}/~/initial_conv', x.astype(np.float32), width, 7, 2)
    x = nn.relu(self.norm(f'{root}/~/initial_batchnorm', x))
    x = nn.max_pool(x, (3, 3), (2, 2), 'SAME')
    for group, count in enumerate(blocks):
      for block in range(count):
        name = f'{root}/~/block_group_{group}/~/block_{block}/~'
        f, stride = width * 2**group, 2 if group and not block else 1
        kernels = [(f, 3, stride), (f, 3, 1)]
        if bottleneck:
          kernels = [(f, 1, 1), (f, 3, stride), (4 * f, 1, 1)]
        shortcut = x
        if block == 0:
          shortcut = self.conv(f'{name}/shortcut_conv', x, kernels[-1][0], 1, stride)
          shortcut = self.norm(f'{name}/shortcut_batchnorm', shortcut)
        for i, kernel in enumerate(kernels):
          x = self.norm(f'{name}/batchnorm_{i}', self.conv(f'{name}/conv_{i}', x, *kernel))
          x = x if i == len(kernels) - 1 else nn.relu(x)
        x = nn.relu(x + shortcut)
    return x.mean((1, 2))

  def mlp(self, name, x, hidden, dim):
    x = x @ self.variable(f'{name}/linear', 'w', (x.shape[-1], hidden))
    x = x + self.variable(f'{name}/linear', 'b', (hidden,))
    x = nn.relu(self.norm(f'{name}/batch_norm', x))
    return x @ self.variable(f'{name}/linear_1', 'w', (hidden, dim))


def images(size):
  """Noise with another mean colour in every image, so that their features differ."""
  rng = np.random.default_rng(3)
  return rng.uniform(rng.uniform(0, 1, (2, 1, 1, 3)), 1, (2, size, size - 1, 3)).astype(np.float32)


def build(seed, size=32, blocks=(2, 2, 2, 2), bottleneck=False, width=4, root='res_net18'):
  """(network, images, features, projection)."""
  net, x = Byol(seed), images(size)
  h = net.encoder(x, blocks, bottleneck, width, root)
  z = net.mlp('projector', h, 24, 6)
  net.mlp('predictor', z, 24, 6)
  net.variable('classifier', 'w', (h.shape[-1], 5))
  net.variable('classifier', 'b', (5,))
  return net, x, np.asarray(h), np.asarray(z)


def _create_namedtuple(name, fields, module):
  """dill's."""


def _create_array(make, args, state, attributes):
  """dill's."""


class Dill(pickle.Pickler):
  """Pickles classes of named tuples, and arrays, as dill does: by calls of its functions."""

  def reducer_override(self, obj):
    if isinstance(obj, type) and hasattr(obj, '_fields'):
      return _create_namedtuple, (obj.__name__, obj._fields, obj.__module__)
    if isinstance(obj, np.ndarray):
      return _create_array, (*obj.__reduce__(), None)
    return NotImplemented


def write(path, modules, online, target, numpy1=True, protocol=2, pickler=Dill):
  """Writes a checkpoint of BYOL, with the names of numpy 1 or 2."""
  flat = modules.FlatMapping
  optimizer = (
    optax.EmptyState(),
    modules.ScaleByLarsState(flat(online.params)),
    optax.EmptyState(),
  )
  params = [flat({k: flat(v) for k, v in net.params.items()}) for net in (online, target)]
  state = modules._ByolExperimentState(*params, online.state, target.state, optimizer)
  tree = {'experiment_state': state, 'step': np.int64(9), 'rng': np.array([0, 1], np.uint32)}
  buffer = io.BytesIO()
  pickler(buffer, protocol=protocol).dump(tree)
  data = buffer.getvalue()
  path.write_bytes(data.replace(b'numpy._core', b'numpy.core') if numpy1 else data)
  return path


def apply(network, x, normalize):
  fields = {k: v for k, v in network.model.items() if not k.startswith('head')}
  net = ResNet(**fields, normalize=normalize)
  return np.asarray(jax.jit(lambda v, x: net.apply(v, x, train=False))(network.encoder, x))


def assert_close(ours, theirs):
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * abs(theirs).max())


@pytest.mark.parametrize(
  'size, depth, settings',
  [
    (32, 18, {}),
    (45, 50, {'blocks': (3, 4, 6, 3), 'bottleneck': True, 'width': 8, 'root': 'res_net50'}),
  ],
)
def test_byol(tmp_path, modules, size, depth, settings):
  """Breaks if padding, a layer, the bias of the projector or one of the two networks is another than in BYOL."""
  online, target = (build(seed, size, **settings) for seed in (0, 1))
  path = write(tmp_path / 'pretrain_res.pkl', modules, online[0], target[0])
  found = {network.name: network for network in weights.networks(path, {})}
  assert list(found) == ['online', 'target']
  for name, (net, x, h, z) in (('online', online), ('target', target)):
    network = found[name]
    width = settings.get('width', 4) / 64
    fields = {'depth': depth, 'width_multiplier': width, 'variant': 'haiku', 'stem': 'imagenet'}
    assert network.model.items() >= fields.items() and network.normalize == 'imagenet'
    assert np.std(h, axis=0).mean() > 1e-3 * abs(h).max()  # the features of the images differ
    assert_close(apply(network, x, network.normalize), h)
    model = network.model
    assert (model['head'], model['head_layers'], model['head_norm']) == ('mlp', 2, 'hidden')
    head = MLP(2, model['head_dim'], model['head_hidden'], model['head_norm'])
    assert_close(np.asarray(head.apply(network.head, h, train=False)[-1]), z)
    np.testing.assert_array_equal(network.classifier['kernel'], net.params['classifier']['w'])
    assert network.notes[-1].endswith('encoder and head: predictor')
  assert not np.allclose(online[2], target[2])


@pytest.mark.parametrize('pickler', [Dill, pickle.Pickler])
@pytest.mark.parametrize('numpy1, protocol', [(True, 2), (False, 2), (False, 4), (False, 5)])
def test_versions_of_pickles(tmp_path, modules, numpy1, protocol, pickler):
  """Breaks if the pickles of another version of Python or numpy, or of pickle instead of dill, are not read."""
  net, *_ = build(0)
  path = write(tmp_path / 'byol.pkl', modules, net, net, numpy1, protocol, pickler)
  online, _ = weights.networks(path, {})
  np.testing.assert_array_equal(
    online.encoder['params']['stem_conv']['kernel'], net.params['res_net18/~/initial_conv']['w']
  )


def test_params_and_state(tmp_path):
  """Breaks if a plain dict of parameters and state is not read, or its unknown normalisation is guessed."""
  net, x, h, _ = build(0)
  net.params['res_net18/~/logits'] = net.params.pop('classifier')
  path = tmp_path / 'weights.pkl'
  path.write_bytes(pickle.dumps({'params': net.params, 'state': net.state}))
  [network] = weights.networks(path, {})
  assert (network.name, network.normalize) == ('', None)
  np.testing.assert_array_equal(network.classifier['kernel'], net.params['res_net18/~/logits']['w'])
  assert_close(apply(network, x, 'imagenet'), h)


STEM, BN = 'res_net18/~/initial_conv', 'res_net18/~/initial_batchnorm'


@pytest.mark.parametrize('change, message', [
  (lambda p, s: p.pop(STEM), '0 modules instead of one are ResNets of Haiku'),
  (lambda p, s: p.update({'net/~/initial_conv': p[STEM]}), '2 modules instead of one'),
  (lambda p, s: p[BN].pop('scale'), 'lacks params/stem_bn/scale'),
  (lambda p, s: s.pop(f'{BN}/~/mean_ema'), 'lacks batch_stats/stem_bn/mean'),
  (lambda p, s: s[f'{BN}/~/var_ema'].pop('average'), 'lacks batch_stats/stem_bn/var'),
  (lambda p, s: p[STEM].update(w=p[STEM]['w'][:3]), 'initial_conv/w is .3, 7, 3, 4. instead of .7, 7, 3, 4.'),
  (lambda p, s: p[STEM].update(w=p[STEM]['w'] * np.nan), 'initial_conv/w has values that are not finite'),
  (lambda p, s: p[STEM].update(b=np.zeros(4)), 'also has initial_conv/b'),
  (lambda p, s: p[STEM].update(w=[1.0]), 'initial_conv/w is no array of numpy'),
  (lambda p, s: p[STEM].update(w=np.zeros((7, 7, 0, 2**40))), 'initial_conv/w is no array of numpy with values'),
  (lambda p, s: p['projector/linear'].update(b=np.zeros(1)), 'projector have different numbers of channels'),
  (lambda p, s: p.update(x=3), 'no dict of a dict for each module'),
  (lambda p, s: p.update({'res_net18/~/final_batchnorm': p[BN]}), 'final_batchnorm/scale is no variable'),
  (lambda p, s: p.update({'res_net18/~/block_group_3/~/block_2/~/conv_0': p[STEM]}), 'blocks are no ResNet'),
  (lambda p, s: p['projector/linear'].update(w=np.zeros((31, 24))), 'projector/linear/w is .31, 24. instead of .32, 24.'),
  (lambda p, s: p['projector/batch_norm'].pop('offset'), 'lacks params/bn1/bias'),
  (lambda p, s: p['classifier'].pop('b'), 'classifier has the variables w instead of w and b'),
])  # fmt: skip
def test_other_networks_are_refused(tmp_path, change, message):
  """Breaks if a file of another network is read, or refused without naming what is wrong."""
  net, *_ = build(0)
  change(net.params, net.state)
  path = tmp_path / 'weights.pkl'
  path.write_bytes(pickle.dumps({'params': net.params, 'state': net.state}))
  with pytest.raises(ConfigError, match=message) as error:
    weights.networks(path, {})
  assert str(path) in str(error.value) and '\n' not in str(error.value)


def test_other_projectors(tmp_path):
  """Breaks if a projector of another kind is imported, or left out without a word."""
  net, *_ = build(0)
  net.params['projector/linear_2'] = net.params['projector/linear_1']
  path = tmp_path / 'weights.pkl'
  path.write_bytes(pickle.dumps({'params': net.params, 'state': net.state}))
  [network] = weights.networks(path, {})
  assert network.head is None and 'left out: the projector' in network.notes[0]


class Call:
  """An object whose pickle calls a function."""

  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


def array(shape=(2,), dtype=b'cnumpy\ndtype\n(X\x02\x00\x00\x00f4K\x00K\x01tR', data=8):
  """The pickle of an array that declares a shape."""
  numbers = b'(' + b''.join(b'\x8a\x08' + n.to_bytes(8, 'little') for n in shape) + b't'
  create = b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01bt' + b'R'
  return (
    b'\x80\x03'
    + create
    + b'(K\x01'
    + numbers
    + dtype
    + b'\x89C'
    + bytes([data])
    + bytes(data)
    + b'tb.'
  )


@pytest.mark.parametrize('data, message', [
  (pickle.dumps(Call(os.system, 'touch executed')), r'contains posix.system, which is not called'),
  (pickle.dumps(Call(eval, '1')), r'contains builtins.eval, which is not called'),
  (pickle.dumps(Call(getattr, {}, 'x')), r'contains builtins.getattr, which is not called'),
  (pickle.dumps(np.array([None])), r'contains an array of the dtype O8'),
  (pickle.dumps(jax.numpy.ones(2)), r'contains arrays of JAX .jax.*: save jax.device_get'),
  (pickle.dumps(collections.Counter()), r'contains collections.Counter, which is not called'),
  (array(shape=(2**40, 2**10)), r'is damaged or no pickle of BYOL: an array of the shape'),
  (array(shape=(3,)), r'is damaged or no pickle of BYOL: an array of the shape .3,. has 8 bytes'),
  (b'\x80\x05\x96' + (2**40).to_bytes(8, 'little') + b'.', r'is damaged or no pickle'),  # a bytearray of 1 TB
  (b'\x80\x05\x8e' + (2**40).to_bytes(8, 'little') + b'.', r'is damaged or no pickle'),  # bytes of 1 TB
  (b'\x80\x05Nr\xff\xff\xff\xff.', r'contains no networks of BYOL'),  # number 2**32 - 1 in the memo
  (b'\x80\x02' + b'(' * 100_000 + b'.', r'is damaged or no pickle'),
  (b'\x80\x02cnumpy\ndtype\n}X\x08\x00\x00\x00__code__Ns\x86b.', r'is damaged or no pickle'),
  (b'\x80\x02ca.XState\n)\x81}X\x01\x00\x00\x00aNsb.', r'is damaged or no pickle'),
  (b'no pickle', r'is damaged or no pickle'),
  (b'', r'is empty'),
  (b'version https://git-lfs.github.com/spec/v1\n', r'is a pointer of Git LFS'),
  (pickle.dumps({'a': 1}), r'contains no networks of BYOL'),
])  # fmt: skip
def test_hostile_and_damaged_pickles(tmp_path, monkeypatch, data, message):
  """Breaks if a pickle executes something, takes memory that the file does not have, or ends with a traceback."""
  monkeypatch.chdir(tmp_path)
  path = tmp_path / 'byol.pkl'
  path.write_bytes(data)
  with pytest.raises(ConfigError, match=message) as error:
    haiku.networks(path, {})
  assert '\n' not in str(error.value) and not (tmp_path / 'executed').exists()


def test_truncated_pickles(tmp_path, modules):
  """Breaks if a pickle that was cut anywhere is read, or ends with a traceback."""
  net, *_ = build(0)
  data = write(tmp_path / 'byol.pkl', modules, net, net).read_bytes()
  path = tmp_path / 'cut.pkl'
  for size in (2, 100, len(data) // 3, len(data) - 1):
    path.write_bytes(data[:size])
    with pytest.raises(ConfigError, match='is damaged or no pickle'):
      haiku.networks(path, {})
