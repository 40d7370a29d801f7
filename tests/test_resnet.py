"""ResNets compared with an implementation in float64 numpy and with torchvision's."""

import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from simclr_jax.models import resnet
from simclr_jax.models.resnet import ResNet

# Depths for these tests: every kind of block, with and without a bottleneck.
SMALL = {'basic': ((2, 1), False), 'bottleneck': ((2, 1), True)}


@pytest.fixture(autouse=True)
def small_depths(monkeypatch):
  for name, depth in SMALL.items():
    monkeypatch.setitem(resnet.DEPTHS, name, depth)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def conv(x, p, stride=1, variant='simclr'):
  """A convolution with (k - 1) / 2 zeros of padding on every side. 'haiku' pads as TensorFlow does: as few zeros as
  the output of n / stride pixels needs, the odd one at the end.
  """
  w = p['kernel']
  pads = [(len(w) // 2,) * 2] * 2
  if variant == 'haiku':
    zeros = [max((-(-n // stride) - 1) * stride + len(w) - n, 0) for n in x.shape[1:3]]
    pads = [(n // 2, n - n // 2) for n in zeros]
  x = np.pad(x, ((0, 0), *pads, (0, 0)))
  x = sliding_window_view(x, w.shape[:2], axis=(1, 2))[:, ::stride, ::stride]
  return np.einsum('nhwcij,ijcd->nhwd', x, w) + p.get('bias', 0)


def max_pool(x, variant):
  """3x3, stride 2. All but 'torchvision' pad as TensorFlow does: for even sizes only at the end."""
  first = 0 if variant != 'torchvision' and x.shape[1] % 2 == 0 else 1
  x = np.pad(x, ((0, 0), (first, 1), (first, 1), (0, 0)), constant_values=-np.inf)
  return sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2].max((-2, -1))


def average_pool(x, stride):
  """2x2, without padding at the start. At the lower and right border, stride 1 averages the existing
  pixels, stride 2 pads with zeros.
  """
  n, h, w, c = x.shape
  out = np.zeros((n, -(-h // stride), -(-w // stride), c))
  for i in range(out.shape[1]):
    for j in range(out.shape[2]):
      window = x[:, i * stride : i * stride + 2, j * stride : j * stride + 2]
      out[:, i, j] = window.mean((1, 2)) if stride == 1 else window.sum((1, 2)) / 4
  return out


class NumpyResNet:
  """`NumpyResNet(...)(variables, x)` computes the output of `ResNet` as the papers describe it."""

  def __init__(self, depth, train, stem='cifar', variant='simclr', sk_ratio=0, se_ratio=0):
    self.blocks, self.bottleneck = SMALL[depth]
    self.train, self.stem, self.variant = train, stem, variant
    self.sk, self.se = sk_ratio > 0, se_ratio > 0

  def norm(self, x, p, s):
    mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if self.train else (s['mean'], s['var'])
    return (x - mean) / np.sqrt(var + 1e-5) * p['scale'] + p['bias']

  def conv_norm(self, x, p, s, i, stride=1):
    return self.norm(conv(x, p[f'conv{i}'], stride, self.variant), p[f'bn{i}'], s[f'bn{i}'])

  def select(self, x, p, s):
    one, two = np.split(x, 2, axis=-1)
    mean = (one + two).mean((1, 2), keepdims=True)
    mean = np.maximum(self.norm(conv(mean, p['reduce']), p['bn'], s['bn']), 0)
    a, b = np.split(conv(mean, p['expand']), 2, axis=-1)
    return sigmoid(a - b) * one + sigmoid(b - a) * two  # the softmax of two streams

  def block(self, x, p, s, stride):
    y = x
    if 'proj_conv' in p:
      pooled = average_pool(x, stride) if self.sk else x
      x = conv(pooled, p['proj_conv'], 1 if self.sk else stride)
      x = self.norm(x, p['proj_bn'], s['proj_bn'])
    if self.bottleneck:
      y = np.maximum(self.conv_norm(y, p, s, 1), 0)
      y = np.maximum(self.conv_norm(y, p, s, 2, stride), 0)
      y = self.select(y, p['sk'], s['sk']) if self.sk else y
      y = self.conv_norm(y, p, s, 3)
    else:
      y = np.maximum(self.conv_norm(y, p, s, 1, stride), 0)
      y = self.conv_norm(y, p, s, 2)
    if self.se:
      mean = np.maximum(conv(y.mean((1, 2), keepdims=True), p['se']['reduce']), 0)
      y = y * sigmoid(conv(mean, p['se']['expand']))
    return np.maximum(x + y, 0)

  def __call__(self, variables, x):
    p, s = variables['params'], variables['batch_stats']
    stride = 1 if self.stem == 'cifar' else 2
    if self.sk and self.stem == 'imagenet':
      for i in (1, 2):
        x = conv(x, p[f'stem_conv{i}'], stride if i == 1 else 1)
        x = np.maximum(self.norm(x, p[f'stem_bn{i}'], s[f'stem_bn{i}']), 0)
      stride = 1
    x = conv(x, p['stem_conv'], stride, self.variant)
    x = np.maximum(self.norm(x, p['stem_bn'], s['stem_bn']), 0)
    if self.stem == 'imagenet':
      x = max_pool(x, self.variant)
    for group, count in enumerate(self.blocks, 1):
      for block in range(1, count + 1):
        name = f'group{group}_block{block}'
        x = self.block(x, p[name], s[name], 2 if group > 1 and block == 1 else 1)
    return x.mean((1, 2))


def random_variables(net, shape):
  """Variables with the shapes of `net.init` and random values: no gamma and no running mean is 0."""
  tree = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros(shape), train=False))
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if path[-1].key == 'kernel':
      return rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape)
    positive = path[-1].key in ('scale', 'var')
    return rng.uniform(0.5, 1.5, leaf.shape) if positive else rng.normal(0, 0.5, leaf.shape)

  return jax.tree_util.tree_map_with_path(draw, tree)


def random_images(shape):
  """Noise with another mean colour in every image, so that their features differ."""
  rng = np.random.default_rng(1)
  return rng.normal(rng.normal(size=(shape[0], 1, 1, 3)), 1.0, shape).astype(np.float32)


def apply_eval_and_train(net, variables, x):
  """(h in evaluation mode, h in training mode, the new running statistics), compiled once."""

  @jax.jit
  def both(variables, x):
    h, new = net.apply(variables, x, train=True, mutable='batch_stats')
    return net.apply(variables, x, train=False), h, new['batch_stats']

  variables, x = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), (variables, x))
  return jax.device_get(both(variables, x))


@pytest.mark.parametrize(
  'depth, size, settings',
  [
    # 26 pixels are 13 after the stem, 7 after the pool, 4 after group 2; 32 are 16, 8, 4.
    ('basic', 32, {'stem': 'imagenet'}),
    ('basic', 32, {'stem': 'imagenet', 'variant': 'torchvision'}),
    ('basic', 26, {'stem': 'imagenet', 'sk_ratio': 0.5}),
    ('bottleneck', 26, {'stem': 'imagenet'}),
    ('bottleneck', 32, {'stem': 'imagenet', 'variant': 'torchvision'}),
    ('basic', 32, {'stem': 'imagenet', 'variant': 'haiku'}),
    ('bottleneck', 26, {'stem': 'imagenet', 'variant': 'haiku'}),
    ('bottleneck', 9, {'stem': 'strided', 'variant': 'haiku'}),
    ('bottleneck', 26, {'stem': 'imagenet', 'sk_ratio': 0.5}),
    ('bottleneck', 32, {'stem': 'imagenet', 'sk_ratio': 0.5}),
    ('bottleneck', 7, {'sk_ratio': 0.5, 'se_ratio': 0.5}),
    ('basic', 8, {'se_ratio': 0.5}),
  ],
  ids=lambda v: '-'.join(map(str, v.values())) if isinstance(v, dict) else str(v),
)
def test_forward_against_numpy(depth, size, settings):
  """Breaks if padding, a stride, a shortcut, the stem or the order of layers changes, also with selective
  kernels, squeeze-and-excitation and ResNet-D.
  """
  net = ResNet(depth, 1 / 8, **{'stem': 'cifar', **settings})
  x = random_images((3, size, size, 3))
  variables = random_variables(net, x.shape)
  evaluated, trained, _ = apply_eval_and_train(net, variables, x)
  for h, train in ((evaluated, False), (trained, True)):
    expected = NumpyResNet(depth, train, **settings)(variables, x)
    assert np.std(expected, axis=0).mean() > 2e-3  # the features of the images differ
    np.testing.assert_allclose(h, expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(
  'name, mean, std',
  [
    ('imagenet', (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ('cifar10', (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
  ],
)
def test_normalize(name, mean, std):
  """Breaks if the input of the first layer is not (x - mean) / std."""
  x = np.random.default_rng(0).random((3, 8, 8, 3))
  variables = random_variables(ResNet('basic', 1 / 8, 'cifar'), x.shape)
  h, _, _ = apply_eval_and_train(ResNet('basic', 1 / 8, 'cifar', normalize=name), variables, x)
  reference = NumpyResNet('basic', train=False)
  np.testing.assert_allclose(h, reference(variables, (x - mean) / std), rtol=1e-4, atol=5e-5)
  assert not np.allclose(h, reference(variables, x), rtol=0.1)


@pytest.mark.parametrize('variant, ddof', [('simclr', 0), ('torchvision', 1), ('haiku', 0)])
def test_running_statistics_against_numpy(variant, ddof):
  """Breaks if the running variance is that of the other variant, or the layers ignore the BatchNorm groups
  and their layout.
  """
  net = ResNet('basic', 1 / 8, 'cifar', variant, groups=2, layout='strided')
  x = random_images((4, 3, 3, 3))
  variables = random_variables(net, x.shape)
  _, _, stats = apply_eval_and_train(net, variables, x)
  y = conv(x, variables['params']['stem_conv'])
  old, new = variables['batch_stats']['stem_bn'], stats['stem_bn']
  var = (y[0::2].var((0, 1, 2), ddof=ddof) + y[1::2].var((0, 1, 2), ddof=ddof)) / 2
  np.testing.assert_allclose(new['mean'], 0.9 * old['mean'] + 0.1 * y.mean((0, 1, 2)), atol=1e-5)
  np.testing.assert_allclose(new['var'], 0.9 * old['var'] + 0.1 * var, rtol=1e-5)


@pytest.mark.parametrize('ratio, channels', [(0.0625, 32), (0.5, 32), (0.75, 48)])
def test_selective_kernels_have_at_least_32_channels(ratio, channels):
  """Breaks if the bottleneck of the selective kernels does not have max(32, f * ratio) channels."""
  net = ResNet('bottleneck', 1, 'cifar', sk_ratio=ratio)
  params = random_variables(net, (1, 8, 8, 3))['params']
  assert params['group1_block1']['sk']['reduce']['kernel'].shape == (1, 1, 64, channels)


def from_torchvision(state):
  """The variables of `ResNet` from a state_dict of torchvision, in numpy."""
  variables = {'params': {}, 'batch_stats': {}}
  leaves = {
    'weight': ('params', 'scale'),
    'bias': ('params', 'bias'),
    'running_mean': ('batch_stats', 'mean'),
    'running_var': ('batch_stats', 'var'),
  }
  for name, value in state.items():
    *module, leaf = name.split('.')
    if module[0] == 'fc' or leaf == 'num_batches_tracked':
      continue
    if module[0].startswith('layer'):
      block = f'group{module[0][-1]}_block{int(module[1]) + 1}'
      layer = {'0': 'proj_conv', '1': 'proj_bn'}[module[3]] if len(module) > 3 else module[2]
      path = [block, layer]
    else:
      path = [{'conv1': 'stem_conv', 'bn1': 'stem_bn'}[module[0]]]
    kind, ours = leaves[leaf]
    if value.ndim == 4:
      ours, value = 'kernel', value.transpose(2, 3, 1, 0)
    tree = variables[kind]
    for key in path:
      tree = tree.setdefault(key, {})
    tree[ours] = value
  return variables


# In a process of its own: importing torch beside TensorFlow may crash.
TORCHVISION = """
import sys
import numpy as np, torch, torchvision

torch.manual_seed(0)
net = getattr(torchvision.models, 'resnet' + sys.argv[1])(weights=None)
net.fc = torch.nn.Identity()
for name, value in net.state_dict().items():
  if name.endswith('running_mean') or ('bn' in name and name.endswith('bias')):
    value.normal_(0, 0.1)
  elif name.endswith('running_var') or ('bn' in name and name.endswith('weight')):
    value.uniform_(0.5, 1.5)
before = {name: value.numpy().copy() for name, value in net.state_dict().items()}
images = torch.from_numpy(np.load(sys.argv[2]).transpose(0, 3, 1, 2).copy())
with torch.no_grad():
  h_eval, h_train = net.eval()(images).numpy(), net.train()(images).numpy()
after = {name + ' after': value.numpy() for name, value in net.state_dict().items()}
np.savez(sys.argv[3], h_eval=h_eval, h_train=h_train, **before, **after)
"""


@pytest.mark.parametrize('depth', [18, 50])
def test_torchvision(depth, tmp_path):
  """Breaks if the torchvision variant computes other features or running statistics than torchvision with
  the same weights.
  """
  if not importlib.util.find_spec('torchvision'):
    pytest.skip('torchvision is not installed: pip install torch torchvision')
  x = random_images((4, 56, 56, 3))  # 28, 14, 14, 7, 4, 2 pixels in the layers
  np.save(tmp_path / 'images.npy', x)
  arguments = [str(depth), tmp_path / 'images.npy', tmp_path / 'torch.npz']
  subprocess.run([sys.executable, '-c', TORCHVISION, *arguments], check=True)
  theirs = dict(np.load(tmp_path / 'torch.npz'))
  h_eval, h_train = theirs.pop('h_eval'), theirs.pop('h_train')
  before = from_torchvision({k: v for k, v in theirs.items() if not k.endswith(' after')})
  after = from_torchvision(
    {k.removesuffix(' after'): v for k, v in theirs.items() if k.endswith(' after')}
  )
  net = ResNet(depth, variant='torchvision')
  expected = jax.eval_shape(lambda: net.init(jax.random.key(0), x, train=False))
  assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, expected)
  evaluated, trained, stats = apply_eval_and_train(net, before, x)

  def assert_close(ours, torch, tolerance):
    np.testing.assert_allclose(ours, torch, rtol=0, atol=tolerance * abs(torch).max())

  assert np.std(h_eval, axis=0).mean() > 1e-3 * h_eval.max()  # the features of the images differ
  assert_close(evaluated, h_eval, 1e-5)
  # Statistics of 16 values amplify rounding: torch in float32 differs by 1e-4 from torch in float64.
  assert_close(trained, h_train, 5e-4)
  jax.tree.map(lambda a, b: assert_close(a, b, 2e-4), stats, after['batch_stats'])
