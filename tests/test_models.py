"""Encoders and heads: published parameter counts, initialisation, settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax.models import encoders, mlp, resnet
from simclr_jax.models.mlp import MLP
from simclr_jax.models.resnet import ResNet

SK = 0.0625  # as in SimCLR v2


def count(tree):
  """The number of elements of all arrays."""
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


@functools.cache
def shapes(module, *shape):
  """The variables of a module for an input of this shape, not computed."""
  return jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(shape), train=False))


def encoder_shapes(depth, width, sk, stem='imagenet', **settings):
  return shapes(ResNet(depth, width, stem, sk_ratio=SK * sk, **settings), 1, 64, 64, 3)


# Counted with the released code of SimCLR, without BatchNorm statistics.
@pytest.mark.parametrize(
  'depth, width, sk, trainable, with_classifier, with_head',
  [
    (50, 1, False, 23_508_032, 25_557_032, 34.22),
    (50, 1, True, 35_215_584, 37_264_584, 45.92),
    (50, 2, False, 93_907_072, 98_004_072, 132.10),
    (50, 2, True, 140_306_048, 144_403_048, 178.50),
    (50, 4, False, 375_378_176, 383_571_176, 518.87),
    (101, 1, False, 42_500_160, 44_549_160, 53.21),
    (101, 1, True, 64_662_304, 66_711_304, 75.37),
    (101, 2, False, 169_771_136, 173_868_136, 207.96),
    (101, 2, True, 257_132_224, 261_229_224, 295.32),
    (152, 1, False, 58_143_808, 60_192_808, 68.85),
    (152, 1, True, 88_940_896, 90_989_896, 99.65),
    (152, 2, False, 232_253_568, 236_350_568, 270.45),
    (152, 2, True, 353_398_528, 357_495_528, 391.59),
    (152, 3, True, 794_704_160, 800_849_160, 877.16),
  ],
)
def test_trainable_parameters(depth, width, sk, trainable, with_classifier, with_head):
  """Breaks if a layer, shortcut or width differs from SimCLR's networks, or if the 3-layer projection
  head has a bias, gamma or beta too many.
  """
  d = 2048 * width
  params = count(encoder_shapes(depth, width, sk)['params'])
  assert params == trainable
  assert params + d * 1000 + 1000 == with_classifier
  head = count(shapes(MLP(3, 128), 2, d)['params'])
  assert round((params + d * 1000 + 1000 + head) / 1e6, 2) == with_head


@pytest.mark.parametrize(
  'depth, width, sk, millions',
  [
    (50, 1, False, 23.56),
    (50, 2, True, 140.43),
    (101, 1, False, 42.61),
    (101, 2, True, 257.38),
    (152, 2, False, 232.56),
    (152, 2, True, 353.75),
    (152, 3, True, 795.24),
  ],
)
def test_parameters_with_batch_norm_statistics(depth, width, sk, millions):
  """Breaks if a BatchNorm is missing: the README of SimCLR counts the statistics as parameters."""
  assert round(count(encoder_shapes(depth, width, sk)) / 1e6, 2) == millions


@pytest.mark.parametrize('depth, expected', [(18, 11_173_056), (34, 21_281_216), (50, 23_500_352)])
def test_trainable_parameters_with_the_cifar_stem(depth, expected):
  """Breaks if the CIFAR stem or the projection shortcuts of the shallow networks change."""
  assert count(encoder_shapes(depth, 1, False, 'cifar')['params']) == expected


@pytest.mark.parametrize('depth', [18, 34])
def test_selective_kernels_of_shallow_networks(depth):
  """Breaks if SK changes blocks of two 3x3 convolutions, other than pooling their shortcuts, or the
  CIFAR stem. In the ImageNet stem, three 3x3 convolutions replace the 7x7 convolution.
  """
  plain, sk = (count(encoder_shapes(depth, 1, on)['params']) for on in (False, True))
  kernel_7x7, kernels_3x3 = 49 * 3 * 64, 9 * (3 * 32 + 32 * 32 + 32 * 64)
  assert sk - plain == kernels_3x3 - kernel_7x7 + 4 * 32
  plain, sk = (encoder_shapes(depth, 1, on, 'cifar') for on in (False, True))
  assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, sk)


def test_squeeze_and_excitation_parameters():
  """Breaks if the bottleneck width is a fraction of the 4 f channels instead of f, or the
  bottleneck has no biases.
  """
  ratio, expected = 1 / 32, 0
  for f, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
    r = f // 32
    expected += blocks * (4 * f * r + r + r * 4 * f + 4 * f)
  plain, se = (count(encoder_shapes(50, 1, False, se_ratio=s)['params']) for s in (0.0, ratio))
  assert se - plain == expected
  narrow = shapes(ResNet(8, 1 / 8, 'cifar', se_ratio=ratio), 1, 32, 32, 3)['params']
  assert narrow['group1_block1']['se']['reduce']['kernel'].shape == (1, 1, 8, 1)


def test_moco_parameters():
  """Breaks if the torchvision variant or the heads of MoCo have other parameter counts than
  published.
  """
  torchvision = {'variant': 'torchvision'}
  assert count(encoder_shapes(18, 1, False, **torchvision)['params']) == 11_689_512 - 513_000
  r50 = count(encoder_shapes(50, 1, False, **torchvision)['params'])
  for layers, expected in ((1, 23_770_304), (2, 27_966_656)):
    head = shapes(MLP(layers, 128, norm='none'), 2, 2048)
    assert set(head) == {'params'}
    assert r50 + count(head['params']) == expected


@pytest.fixture(scope='module')
def initial():
  """Initial parameters of a small network in all variants."""
  x = jnp.zeros((1, 8, 8, 3))

  def init(variant):
    net = ResNet(8, 0.5, 'cifar', variant)
    key = jax.random.key(0, impl='rbg')  # compiles four times as fast
    return jax.jit(lambda: net.init(key, x, train=False))()['params']

  return {variant: init(variant) for variant in resnet.VARIANTS}


def test_initial_gammas_and_shortcuts(initial):
  """Breaks if the initial last gamma of a block, or the shortcut of the first group, is that of
  another variant.
  """
  simclr, torch = initial['simclr'], initial['torchvision']
  assert 'proj_conv' in simclr['group1_block1'] and 'proj_conv' not in torch['group1_block1']
  assert 'proj_conv' in simclr['group2_block1'] and 'proj_conv' in torch['group2_block1']
  for params, last_gamma in ((simclr, 0), (torch, 1)):
    for name in (name for name in params if name.startswith('group')):
      assert (params[name]['bn2']['scale'] == last_gamma).all()
      assert (params[name]['bn1']['scale'] == 1).all()
      assert not params[name]['bn1']['bias'].any() and not params[name]['bn2']['bias'].any()
  jax.tree.map(np.testing.assert_array_equal, initial['haiku'], simclr)


@pytest.mark.parametrize(
  'layer, fan_in, fan_out', [('conv1', 9 * 64, 9 * 128), ('proj_conv', 64, 128)]
)
def test_initial_kernels(initial, layer, fan_in, fan_out):
  """Breaks if the initialiser of a variant uses another fan, gain or truncation (SimCLR: at 2
  sigma; torch: none).
  """
  simclr, torch = (
    np.ravel(initial[d]['group3_block1'][layer]['kernel']) for d in ('simclr', 'torchvision')
  )
  n = simclr.size
  for weights, std in ((simclr, (1 / fan_in) ** 0.5), (torch, (2 / fan_out) ** 0.5)):
    np.testing.assert_allclose(weights.std(), std, rtol=4 / (2 * n) ** 0.5)  # 4 standard errors
    assert abs(weights.mean()) < 4 * std / n**0.5
  # Truncated at 2 sigma; truncation reduces the standard deviation of a normal distribution to 0.8796.
  assert abs(simclr).max() <= 2 * (1 / fan_in) ** 0.5 / 0.8796
  assert abs(torch).max() > 3 * (2 / fan_out) ** 0.5


@pytest.mark.parametrize('stem, factor', [('imagenet', 4), ('strided', 2), ('cifar', 1)])
def test_resolution_after_the_stem(stem, factor):
  """Breaks if the stride or the pooling of a stem changes the input size of the first block."""
  x = jnp.zeros((1, 64, 64, 3))

  def first_block(sk_ratio):
    net = ResNet(18, 1 / 32, stem, sk_ratio=sk_ratio)

    def is_projection(module, method):
      return module.name == 'proj_conv'

    def forward(key):
      return net.init_with_output(key, x, train=False, capture_intermediates=is_projection)

    block = jax.eval_shape(forward, jax.random.key(0))[1]['intermediates']['group1_block1']
    return block['proj_conv']['__call__'][0].shape[1]

  assert first_block(0.0) == first_block(SK) == 64 // factor


def test_invalid_settings_are_refused():
  """Breaks if a misspelt setting is silently replaced by another one."""
  invalid = {'depth': 19, 'stem': 'cifr', 'variant': 'torch', 'normalize': 'cifar', 'layout': 'x'}
  for name, value in invalid.items():
    with pytest.raises(ValueError, match=name):
      shapes(ResNet(**{'depth': 18, name: value}), 1, 32, 32, 3)
  with pytest.raises(ValueError, match='norm'):
    shapes(MLP(norm='both'), 2, 8)


def test_head_modes():
  """Breaks if the number of layers, a width or the last BatchNorm of a head changes."""
  h = jax.random.normal(jax.random.key(0), (8, 6))
  for mode, layers, widths in (('none', 2, [6]), ('linear', 2, [6, 4]), ('mlp', 3, [6, 6, 6, 4])):
    config = {'head': mode, 'head_layers': layers}
    head = MLP(mlp.depth(config), 4)
    outputs, variables = head.init_with_output(jax.random.key(1), h, train=False)
    assert [x.shape[1] for x in outputs] == widths
    if mode == 'mlp':
      assert set(variables['params']['bn3']) == {'scale'}
      assert set(variables['params']['bn1']) == {'scale', 'bias'}
      assert set(variables['params']['dense1']) == {'kernel'}
      assert all((x >= 0).all() for x in outputs[1:-1])
      assert (outputs[-1] < 0).any()


def test_simclr_head_against_numpy():
  """Breaks if dense layer, BatchNorm and ReLU change order, or the head ignores the BatchNorm
  groups.
  """
  rng = np.random.default_rng(0)
  h = rng.normal(size=(8, 6))
  head = MLP(2, 4, groups=2, layout='strided')
  v = head.init(jax.random.key(1), jnp.zeros((8, 6)), train=False)
  v = jax.tree.map(lambda x: rng.uniform(-1, 1, x.shape), v)
  outputs, _ = head.apply(v, jnp.asarray(h, jnp.float32), train=True, mutable='batch_stats')

  def norm(x, p):
    grouped = np.stack([x[0::2], x[1::2]], axis=1)  # [4, 2, c]
    grouped = (grouped - grouped.mean(0)) / np.sqrt(grouped.var(0) + 1e-5)
    return grouped.reshape(x.shape) * p['scale'] + p.get('bias', 0)

  p = v['params']
  hidden = np.maximum(norm(h @ p['dense1']['kernel'], p['bn1']), 0)
  z = norm(hidden @ p['dense2']['kernel'], p['bn2'])
  for output, expected in zip(outputs, (h, hidden, z), strict=True):
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)


def test_moco_head_against_numpy():
  """Breaks if MoCo's head has a BatchNorm, lacks a bias or its ReLU, or is initialised differently."""
  h = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
  for layers in (1, 2):
    head = MLP(layers, 32, norm='none')
    outputs, v = head.init_with_output(jax.random.key(1), h, train=True)
    assert len(outputs) == layers + 1
    x = h.astype(np.float64)
    for i in range(1, layers + 1):
      p = v['params'][f'dense{i}']
      for values in (p['kernel'], p['bias']):  # U(-1/8, 1/8): 8 is the square root of the fan-in
        assert abs(values).max() <= 1 / 8
        n = values.size
        np.testing.assert_allclose(np.std(values), 1 / 8 / 3**0.5, rtol=2 / n**0.5)
        assert abs(np.mean(values)) < 4 / 8 / (3 * n) ** 0.5
      x = x @ np.float64(p['kernel']) + np.float64(p['bias'])
      x = x if i == layers else np.maximum(x, 0)
      np.testing.assert_allclose(outputs[i], x, rtol=1e-5, atol=1e-6)


def test_initial_kernels_of_the_simclr_head():
  """Breaks if the dense layers of SimCLR's head are not initialised with standard deviation 0.01."""
  v = MLP(2, 64).init(jax.random.key(0), jnp.zeros((2, 64)), train=False)
  for layer in ('dense1', 'dense2'):
    kernel = v['params'][layer]['kernel']
    np.testing.assert_allclose(np.std(kernel), 0.01, rtol=0.05)
    assert abs(kernel).max() > 0.03  # not truncated


def test_from_config():
  """Breaks if the network or its head ignores a field of a recipe's `model` part."""
  config = {
    'depth': 34,
    'width_multiplier': 2.0,
    'stem': 'cifar',
    'variant': 'torchvision',
    'bn_groups': 4,
    'bn_layout': 'strided',
    'sk_ratio': 0.125,
    'se_ratio': 0.25,
    'normalize': 'cifar10',
    'head': 'linear',
    'head_layers': 3,
    'head_dim': 16,
    'head_norm': 'none',
    'head_hidden': 24,
    'encoder': '',
  }
  assert resnet.from_config(config, jnp.bfloat16) == ResNet(
    34, 2.0, 'cifar', 'torchvision', 4, 'strided', 0.125, 0.25, 'cifar10', jnp.bfloat16
  )
  assert encoders.build(config, jnp.bfloat16) == resnet.from_config(config, jnp.bfloat16)
  assert mlp.head(config, jnp.bfloat16) == MLP(1, 16, 24, 'none', 4, 'strided', jnp.bfloat16)
  assert mlp.head({**config, 'head': 'mlp'}, keep=2) == MLP(3, 16, 24, 'none', 4, 'strided', keep=2)


def test_mlp_norms_of_other_methods():
  """Breaks if BYOL's head or SimSiam's projector has other layers, hidden widths or normalisation."""
  h = jnp.zeros((8, 6))

  def parameters(norm):
    return MLP(3, 4, 10, norm).init(jax.random.key(0), h, train=False)['params']

  byol = parameters('hidden')
  assert {k: set(v) for k, v in byol.items()} == {
    'dense1': {'kernel'}, 'bn1': {'scale', 'bias'}, 'dense2': {'kernel'}, 'bn2': {'scale', 'bias'},
    'dense3': {'kernel', 'bias'},
  }  # fmt: skip
  assert [byol[f'dense{i}']['kernel'].shape for i in (1, 2, 3)] == [(6, 10), (10, 10), (10, 4)]
  bound = 10**-0.5  # torch.nn.Linear: U(-1, 1) / sqrt(fan-in)
  assert 0.9 * bound < abs(byol['dense2']['kernel']).max() <= bound
  simsiam = MLP(3, 4, 10, 'all_last_plain')
  variables = simsiam.init(jax.random.key(0), h, train=False)
  assert 'bn3' not in variables['params'] and 'bn3' in variables['batch_stats']
  x = jax.random.normal(jax.random.key(1), h.shape)
  z = simsiam.apply(variables, x, train=True, mutable='batch_stats')[0][-1]
  np.testing.assert_allclose(z.mean(0), 0, atol=1e-5)
  np.testing.assert_allclose(z.std(0), 1, atol=1e-2)
