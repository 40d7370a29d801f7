"""Networks and heads: published parameter counts, initial values, settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax.models import encoders, mlp, resnet
from simclr_jax.models.mlp import MLP
from simclr_jax.models.resnet import ResNet

SK = 0.0625  # SimCLR v2's


def count(tree):
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


@functools.cache
def shapes(module, *shape):
  return jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(shape), train=False))


def backbone(depth, width, sk, stem='imagenet', **settings):
  return shapes(ResNet(depth, width, stem, sk_ratio=SK * sk, **settings), 1, 64, 64, 3)


# Counted in the released code of SimCLR, without the statistics of BatchNorm.
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
  """Breaks if a layer, shortcut or width differs from SimCLR's networks, or if the 3-layer
  projection head has a bias, or a gamma or beta too many.
  """
  d = 2048 * width
  params = count(backbone(depth, width, sk)['params'])
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
def test_parameters_with_statistics(depth, width, sk, millions):
  """Breaks if a BatchNorm is missing: SimCLR's README counts the statistics too."""
  assert round(count(backbone(depth, width, sk)) / 1e6, 2) == millions


@pytest.mark.parametrize('depth, expected', [(18, 11_173_056), (34, 21_281_216), (50, 23_500_352)])
def test_trainable_parameters_with_the_cifar_stem(depth, expected):
  """Breaks if the CIFAR stem or the projections of the shallow networks change."""
  assert count(backbone(depth, 1, False, 'cifar')['params']) == expected


@pytest.mark.parametrize('depth', [18, 34])
def test_selective_kernels_leave_shallow_blocks_alone(depth):
  """Breaks if SK does more to blocks of two 3x3 convolutions than pooling their shortcuts, or
  touches the CIFAR stem: by hand, the 7x7 convolution goes, two of 3x3 and their BatchNorms come.
  """
  plain, sk = (count(backbone(depth, 1, on)['params']) for on in (False, True))
  seven, three = 49 * 3 * 64, 9 * (3 * 32 + 32 * 32 + 32 * 64)
  assert sk - plain == three - seven + 4 * 32
  plain, sk = (backbone(depth, 1, on, 'cifar') for on in (False, True))
  assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, sk)


def test_squeeze_and_excitation_parameters():
  """Breaks if its bottleneck is a share of the 4 f channels and not of f, or has no biases."""
  ratio, more = 1 / 32, 0
  for f, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
    r = f // 32
    more += blocks * (4 * f * r + r + r * 4 * f + 4 * f)
  plain, se = (count(backbone(50, 1, False, se_ratio=s)['params']) for s in (0.0, ratio))
  assert se - plain == more
  tiny = shapes(ResNet(8, 1 / 8, 'cifar', se_ratio=ratio), 1, 32, 32, 3)['params']
  assert tiny['group1_block1']['se']['reduce']['kernel'].shape == (1, 1, 8, 1)


def test_moco_parameters():
  """Breaks if torchvision's ResNets or MoCo's heads have other parameters than published."""
  torchvision = {'variant': 'torchvision'}
  assert count(backbone(18, 1, False, **torchvision)['params']) == 11_689_512 - 513_000
  r50 = count(backbone(50, 1, False, **torchvision)['params'])
  for layers, expected in ((1, 23_770_304), (2, 27_966_656)):
    head = shapes(MLP(layers, 128, norm='none'), 2, 2048)
    assert set(head) == {'params'}
    assert r50 + count(head['params']) == expected


@pytest.fixture(scope='module')
def initial():
  """Parameters of a small network in both variants."""
  x = jnp.zeros((1, 8, 8, 3))

  def init(variant):
    net = ResNet(8, 0.5, 'cifar', variant)
    key = jax.random.key(0, impl='rbg')  # compiles in a quarter of the time
    return jax.jit(lambda: net.init(key, x, train=False))()['params']

  return {variant: init(variant) for variant in resnet.VARIANTS}


def test_initial_gammas_and_shortcuts(initial):
  """Breaks if a variant's last gamma or the shortcut of its first group changes sides."""
  simclr, torch = initial['simclr'], initial['torchvision']
  assert 'proj_conv' in simclr['group1_block1'] and 'proj_conv' not in torch['group1_block1']
  assert 'proj_conv' in simclr['group2_block1'] and 'proj_conv' in torch['group2_block1']
  for params, last in ((simclr, 0), (torch, 1)):
    for name in (name for name in params if name.startswith('group')):
      assert (params[name]['bn2']['scale'] == last).all()
      assert (params[name]['bn1']['scale'] == 1).all()
      assert not params[name]['bn1']['bias'].any() and not params[name]['bn2']['bias'].any()


@pytest.mark.parametrize(
  'layer, fan_in, fan_out', [('conv1', 9 * 64, 9 * 128), ('proj_conv', 64, 128)]
)
def test_initial_kernels(initial, layer, fan_in, fan_out):
  """Breaks if a variant's initialiser gets another fan, gain, or tail (truncated at 2 sigma or not)."""
  simclr, torch = (np.ravel(initial[d]['group3_block1'][layer]['kernel']) for d in resnet.VARIANTS)
  n = simclr.size
  for weights, std in ((simclr, (1 / fan_in) ** 0.5), (torch, (2 / fan_out) ** 0.5)):
    np.testing.assert_allclose(weights.std(), std, rtol=4 / (2 * n) ** 0.5)  # 4 standard errors
    assert abs(weights.mean()) < 4 * std / n**0.5
  # Truncated at 2 sigma of the normal whose standard deviation the truncation shrinks to 0.8796.
  assert abs(simclr).max() <= 2 * (1 / fan_in) ** 0.5 / 0.8796
  assert abs(torch).max() > 3 * (2 / fan_out) ** 0.5


@pytest.mark.parametrize('stem, shrinks', [('imagenet', 4), ('strided', 2), ('cifar', 1)])
def test_stems_set_the_resolution(stem, shrinks):
  """Breaks if a stem's stride or pool changes: what the first block gets of 64 pixels."""
  x = jnp.zeros((1, 64, 64, 3))

  def first_block(sk_ratio):
    net = ResNet(18, 1 / 32, stem, sk_ratio=sk_ratio)
    seen = lambda module, _: module.name == 'proj_conv'  # noqa: E731
    run = lambda key: net.init_with_output(key, x, train=False, capture_intermediates=seen)  # noqa: E731
    block = jax.eval_shape(run, jax.random.key(0))[1]['intermediates']['group1_block1']
    return block['proj_conv']['__call__'][0].shape[1]

  assert first_block(0.0) == first_block(SK) == 64 // shrinks


def test_unknown_values_are_refused():
  """Breaks if a misspelt setting silently becomes another one."""
  wrong = {'depth': 19, 'stem': 'cifr', 'variant': 'torch', 'normalize': 'cifar', 'layout': 'x'}
  for name, value in wrong.items():
    with pytest.raises(ValueError, match=name):
      shapes(ResNet(**{'depth': 18, name: value}), 1, 32, 32, 3)
  with pytest.raises(ValueError, match='norm'):
    shapes(MLP(norm='both'), 2, 8)


def test_head_modes():
  """Breaks if the hidden layers, widths or the last BatchNorm of a head change."""
  h = jax.random.normal(jax.random.key(0), (8, 6))
  for mode, layers, lengths in (('none', 2, [6]), ('linear', 2, [6, 4]), ('mlp', 3, [6, 6, 6, 4])):
    config = {'head': mode, 'head_layers': layers}
    head = MLP(mlp.depth(config), 4)
    hiddens, variables = head.init_with_output(jax.random.key(1), h, train=False)
    assert [x.shape[1] for x in hiddens] == lengths
    if mode == 'mlp':
      assert set(variables['params']['bn3']) == {'scale'}
      assert set(variables['params']['bn1']) == {'scale', 'bias'}
      assert set(variables['params']['dense1']) == {'kernel'}
      assert all((x >= 0).all() for x in hiddens[1:-1])
      assert (hiddens[-1] < 0).any()


def test_simclr_head_against_numpy():
  """Breaks if dense, BatchNorm and ReLU change order, or the head's groups do not get through."""
  rng = np.random.default_rng(0)
  h = rng.normal(size=(8, 6))
  head = MLP(2, 4, groups=2, layout='strided')
  v = head.init(jax.random.key(1), jnp.zeros((8, 6)), train=False)
  v = jax.tree.map(lambda x: rng.uniform(-1, 1, x.shape), v)
  hiddens, _ = head.apply(v, jnp.asarray(h, jnp.float32), train=True, mutable='batch_stats')

  def norm(x, p):
    parts = np.stack([x[0::2], x[1::2]], axis=1)  # [4, 2, c]
    parts = (parts - parts.mean(0)) / np.sqrt(parts.var(0) + 1e-5)
    return parts.reshape(x.shape) * p['scale'] + p.get('bias', 0)

  p = v['params']
  hidden = np.maximum(norm(h @ p['dense1']['kernel'], p['bn1']), 0)
  z = norm(hidden @ p['dense2']['kernel'], p['bn2'])
  for got, expected in zip(hiddens, (h, hidden, z), strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_moco_head_against_numpy():
  """Breaks if MoCo's head gets a BatchNorm, loses a bias or its ReLU, or starts as another one."""
  h = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
  for layers in (1, 2):
    head = MLP(layers, 32, norm='none')
    hiddens, v = head.init_with_output(jax.random.key(1), h, train=True)
    assert len(hiddens) == layers + 1
    x = h.astype(np.float64)
    for i in range(1, layers + 1):
      p = v['params'][f'dense{i}']
      for values in (p['kernel'], p['bias']):  # U(-1/8, 1/8): 8 is the root of the fan-in
        assert abs(values).max() <= 1 / 8
        n = values.size
        np.testing.assert_allclose(np.std(values), 1 / 8 / 3**0.5, rtol=2 / n**0.5)
        assert abs(np.mean(values)) < 4 / 8 / (3 * n) ** 0.5
      x = x @ np.float64(p['kernel']) + np.float64(p['bias'])
      x = x if i == layers else np.maximum(x, 0)
      np.testing.assert_allclose(hiddens[i], x, rtol=1e-5, atol=1e-6)


def test_simclr_head_starts_small():
  """Breaks if SimCLR's dense layers start otherwise than from N(0, 0.01)."""
  v = MLP(2, 64).init(jax.random.key(0), jnp.zeros((2, 64)), train=False)
  for layer in ('dense1', 'dense2'):
    kernel = v['params'][layer]['kernel']
    np.testing.assert_allclose(np.std(kernel), 0.01, rtol=0.05)
    assert abs(kernel).max() > 0.03  # not truncated


def test_from_config():
  """Breaks if a field of a recipe's `model` part does not reach the network or its head."""
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
  """Breaks if a hidden width or a choice of normalisation gives other layers: BYOL's head, SimSiam's projector."""
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
