"""Networks against published parameter counts and plain numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax.models.heads import ProjectionHead
from simclr_jax.models.norm import BatchNorm
from simclr_jax.models.resnet import ResNet


def count(tree):
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def shapes(module, *shape):
  return jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(shape), train=False))


@pytest.mark.parametrize(
  'depth, width, stem, expected',
  [
    (18, 1, 'cifar', 11_173_056),
    (34, 1, 'cifar', 21_281_216),
    (50, 1, 'cifar', 23_500_352),
    (50, 1, 'imagenet', 23_508_032),
    (50, 2, 'imagenet', 93_907_072),
    (50, 4, 'imagenet', 375_378_176),
    (101, 1, 'imagenet', 42_500_160),
    (101, 2, 'imagenet', 169_771_136),
    (152, 1, 'imagenet', 58_143_808),
    (152, 2, 'imagenet', 232_253_568),
  ],
)
def test_trainable_parameters_of_the_backbone(depth, width, stem, expected):
  """Breaks if a layer, shortcut or width differs from SimCLR's networks."""
  params = shapes(ResNet(depth, width, stem), 1, 64, 64, 3)['params']
  assert count(params) == expected


@pytest.mark.parametrize(
  'depth, width, linear, everything',
  [
    (50, 1, 25_557_032, 34.22),
    (50, 2, 98_004_072, 132.10),
    (50, 4, 383_571_176, 518.87),
    (101, 1, 44_549_160, 53.21),
    (101, 2, 173_868_136, 207.96),
    (152, 1, 60_192_808, 68.85),
    (152, 2, 236_350_568, 270.45),
  ],
)
def test_parameters_with_classifier_and_head(depth, width, linear, everything):
  """Breaks if the 3-layer projection head has a bias, or a gamma or beta too many."""
  d = 2048 * width
  backbone = count(shapes(ResNet(depth, width), 1, 64, 64, 3)['params'])
  classifier = d * 1000 + 1000
  assert backbone + classifier == linear
  head = count(shapes(ProjectionHead('mlp', 3, 128), 2, d)['params'])
  assert round((backbone + classifier + head) / 1e6, 2) == everything


def test_moving_statistics_count():
  """Breaks if a BatchNorm is missing: SimCLR's README counts R50 with its statistics, 23.56 M."""
  assert round(count(shapes(ResNet(50), 1, 64, 64, 3)) / 1e6, 2) == 23.56


def test_dialects_differ_where_stated():
  """Breaks if a dialect's shortcuts, last gamma, initialisation or pooling change sides."""
  key, x = jax.random.key(0), jnp.zeros((1, 64, 64, 3))
  simclr = ResNet(18).init(key, x, train=False)['params']
  torch = ResNet(18, dialect='torchvision').init(key, x, train=False)['params']
  assert 'proj_conv' in simclr['group1_block1'] and 'proj_conv' not in torch['group1_block1']
  assert 'proj_conv' in simclr['group2_block1'] and 'proj_conv' in torch['group2_block1']
  assert not simclr['group1_block1']['bn2']['scale'].any()
  assert (torch['group1_block1']['bn2']['scale'] == 1).all()
  kernel = (3, 3, 256, 512)  # group4_block1/conv1
  for params, std in ((simclr, (1 / (9 * 256)) ** 0.5), (torch, (2 / (9 * 512)) ** 0.5)):
    weights = params['group4_block1']['conv1']['kernel']
    assert weights.shape == kernel
    np.testing.assert_allclose(np.std(weights), std, rtol=0.01)
  # torchvision's ResNet-18 without its classifier has 11,689,512 - 513,000 parameters.
  assert count(torch) == 11_176_512


@pytest.mark.parametrize('dialect, first', [('simclr', 0), ('torchvision', -1)])
def test_max_pool_padding(dialect, first):
  """Breaks if the first pooled pixel looks at other stem pixels than 0..2 (SAME) or -1..1 (torch)."""
  net = ResNet(18, 1 / 64, dialect=dialect)
  x = jax.random.normal(jax.random.key(1), (1, 32, 32, 3))
  variables = net.init(jax.random.key(0), x, train=False)
  _, seen = net.apply(
    variables,
    x,
    train=False,
    capture_intermediates=lambda m, _: m.name in ('stem_bn', 'proj_conv', 'conv1'),
  )
  stem = np.maximum(seen['intermediates']['stem_bn']['__call__'][0][0, ..., 0], 0)
  window = stem[max(first, 0) : first + 3, max(first, 0) : first + 3].max()
  pooled = nn.max_pool(
    jnp.asarray(stem)[None, ..., None], (3, 3), (2, 2), 'SAME' if first == 0 else [(1, 1), (1, 1)]
  )
  assert pooled[0, 0, 0, 0] == window
  # The pooled map is what the first block sees: recompute its first convolution by hand at (0, 0).
  w = variables['params']['group1_block1']['conv1']['kernel'][..., 0, 0]
  p = np.pad(np.asarray(pooled)[0, ..., 0], 1)[:3, :3]
  got = seen['intermediates']['group1_block1']['conv1']['__call__'][0][0, 0, 0, 0]
  np.testing.assert_allclose(got, (p * w).sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('stem, shrinks', [('imagenet', 4), ('strided', 2), ('cifar', 1)])
def test_stems_set_the_resolution(stem, shrinks):
  """Breaks if a stem's stride or pool changes: what the first block gets of 64 pixels."""
  net = ResNet(18, 1 / 64, stem)
  x = jnp.zeros((1, 64, 64, 3))

  def first_block(key):
    seen = lambda module, _: module.name == 'proj_conv'  # noqa: E731
    return net.init_with_output(key, x, train=False, capture_intermediates=seen)[1]['intermediates']

  block = jax.eval_shape(first_block, jax.random.key(0))['group1_block1']
  assert block['proj_conv']['__call__'][0].shape[1] == 64 // shrinks


def test_unknown_values_are_refused():
  """Breaks if a misspelt stem silently becomes another one."""
  for wrong in ({'depth': 19}, {'stem': 'cifr'}, {'dialect': 'torch'}):
    with pytest.raises(ValueError, match=next(iter(wrong))):
      shapes(ResNet(**{'depth': 18, **wrong}), 1, 32, 32, 3)


def test_head_modes():
  """Breaks if a head's hidden layers, widths or last BatchNorm change."""
  h = jax.random.normal(jax.random.key(0), (8, 6))
  for mode, layers, lengths in (('none', 2, [6]), ('linear', 2, [6, 4]), ('mlp', 3, [6, 6, 6, 4])):
    head = ProjectionHead(mode, layers, 4)
    hiddens, variables = head.init_with_output(jax.random.key(1), h, train=False)
    assert [x.shape[1] for x in hiddens] == lengths
    if mode == 'mlp':
      assert set(variables['params']['bn3']) == {'scale'}
      assert set(variables['params']['bn1']) == {'scale', 'bias'}
      assert all((x >= 0).all() for x in hiddens[1:-1])


def test_batch_norm_equals_flax():
  """Breaks if normalisation or running statistics leave flax.linen.BatchNorm's, train or eval."""
  x = 3 + 2 * jax.random.normal(jax.random.key(0), (16, 4, 4, 5))
  ours, theirs = BatchNorm(), nn.BatchNorm(momentum=0.9, epsilon=1e-5)
  variables = ours.init(jax.random.key(1), x, train=True)
  np.testing.assert_array_equal(variables['batch_stats']['mean'], np.zeros(5))
  y, new = ours.apply(variables, x, train=True, mutable='batch_stats')
  z, expected = theirs.apply(variables, x, use_running_average=False, mutable='batch_stats')
  np.testing.assert_allclose(y, z, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), new, dict(expected))
  variables = {**variables, **new}
  y = ours.apply(variables, x, train=False)
  np.testing.assert_allclose(y, theirs.apply(variables, x, use_running_average=True), atol=1e-5)


def test_batch_norm_groups():
  """Breaks if groups are not contiguous, or the running average is not the groups' mean."""
  x = np.asarray(jax.random.normal(jax.random.key(0), (12, 3)), np.float64)
  norm = BatchNorm(groups=3)
  variables = norm.init(jax.random.key(1), x, train=True)
  y, new = norm.apply(variables, jnp.asarray(x, jnp.float32), train=True, mutable='batch_stats')
  parts = x.reshape(3, 4, 3)
  mean, var = parts.mean(1, keepdims=True), parts.var(1, keepdims=True)
  np.testing.assert_allclose(y, ((parts - mean) / np.sqrt(var + 1e-5)).reshape(12, 3), atol=1e-5)
  np.testing.assert_allclose(new['batch_stats']['mean'], 0.1 * mean.mean(0)[0], atol=1e-6)
  np.testing.assert_allclose(new['batch_stats']['var'], 0.9 + 0.1 * var.mean(0)[0], atol=1e-6)
  with pytest.raises(ValueError, match='groups'):
    norm.apply(variables, jnp.zeros((10, 3)), train=True, mutable='batch_stats')
