"""Weights in files of PyTorch and safetensors: every layout, and files that are damaged or hostile."""

import functools
import io
import json
import pathlib
import pickle
import struct
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors

from simclr_jax import encoder as encoders
from simclr_jax.errors import ConfigError
from simclr_jax.interop import layouts, pickles, torch_names, weights
from simclr_jax.models import mlp

DATA = pathlib.Path(__file__).parent / 'data'
REASON = 'make test-interop runs the tests that need PyTorch'
MODEL = {
  'depth': 18, 'width_multiplier': 0.125, 'sk_ratio': 0.0, 'se_ratio': 0.0, 'stem': 'imagenet', 'variant': 'torchvision',
}  # fmt: skip
HEAD = {'head': 'mlp', 'head_layers': 2, 'head_hidden': 0, 'head_dim': 5, 'head_norm': 'none'}
D = 64  # features of MODEL


def architecture(**model):
  return {
    'encoder': '', 'bn_groups': 1, 'bn_layout': 'contiguous', 'normalize': 'none', 'image_size': 32, 'channels': 3,
    'eval_view': 'center_crop(1)', **MODEL, **model,
  }  # fmt: skip


def numbers(shape, rng, name=''):
  """Seeded numbers; variances are positive."""
  low, high = (0.5, 1.5) if name.endswith(('var', 'scale')) else (-0.3, 0.3)
  return rng.uniform(low, high, shape).astype(np.float32)


def variables(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree_util.tree_map_with_path(lambda k, x: numbers(x.shape, rng, k[-1].key), shapes)


@functools.cache
def encoder(seed=0, **model):
  """Flax variables of an encoder, and its tensors with torchvision's names."""
  a = architecture(**model)
  found = variables(encoders.shapes(a), seed)
  return found, torch_names.to_torch(torch_names.encoder(a), found)


@functools.cache
def head(seed=0, **model):
  """Flax variables of a projection head, and its tensors with the names of a torch.nn.Sequential."""
  a = architecture(**{**HEAD, **model})
  found = variables(encoders.head_shapes(a), seed)
  return found, torch_names.to_torch(torch_names.head(a, D), found)


def prefixed(prefix, tensors):
  return {prefix + name: x for name, x in tensors.items()}


def assert_equal(found, wanted):
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


def features(model, tree, images):
  return encoders.Encoder(architecture(**model), tree).forward(images)


def images(size=33, seed=5):
  return np.random.default_rng(seed).random((2, size, size, 3), np.float32)


def legacy(path, tree):
  """Writes the format before PyTorch 1.6, in which the storages follow their pickles."""
  arrays = []
  contents = b'\x80\x02' + pickles._pickled(tree, arrays).replace(b'tQ', b'NtQ') + b'.'
  dump = functools.partial(pickle.dumps, protocol=2)
  parts = [dump(pickles.MAGIC), dump(1001), dump({'protocol_version': 1001, 'little_endian': True})]
  keys = [str(i) for i in range(len(arrays))]
  parts += [contents, dump(keys)]
  parts += [struct.pack('<q', x.size) + x.tobytes() for x in arrays]
  path.write_bytes(b''.join(parts))


# Layouts.


def sequential(tensors, first=4):
  """Names of `torch.nn.Sequential(*network.children())`."""
  places = {'conv1': '0', 'bn1': '1', **{f'layer{i + 1}': str(first + i) for i in range(4)}}
  return {'.'.join([places[n.split('.')[0]], *n.split('.')[1:]]): x for n, x in tensors.items()}


def transformers(tensors):
  """Names of Hugging Face's ResNetModel."""
  result = {}
  for name, x in tensors.items():
    words = name.split('.')
    if words[0].startswith('layer'):
      group, block, layer, *rest = words
      if layer == 'downsample':
        inner = f'shortcut.{("convolution", "normalization")[int(rest[0])]}'
      else:
        kind = 'convolution' if layer.startswith('conv') else 'normalization'
        inner = f'layer.{int(layer[-1]) - 1}.{kind}'
      module = f'encoder.stages.{int(group[-1]) - 1}.layers.{block}.{inner}'
    else:
      module = f'embedder.embedder.{"convolution" if words[0] == "conv1" else "normalization"}'
    result[f'{module}.{words[-1]}'] = x
  return result


def shortcut(tensors):
  """Names of CIFAR ResNets."""
  return {name.replace('.downsample.', '.shortcut.'): x for name, x in tensors.items()}


T = encoder()[1]
FC = {'fc.weight': np.ones((7, D), np.float32), 'fc.bias': np.arange(7, dtype=np.float32)}
SINGLE = {  # name -> file
  'torchvision': {**T, **FC},
  'lightly-train': T,
  'module': prefixed('module.', T),
  'nested prefixes': prefixed('model.module._orig_mod.net.', T),
  'lincls': {'epoch': 1, 'arch': 'x', 'state_dict': prefixed('module.', {**T, **FC}), 'best_acc1': np.array(3.5)},
  'lightly': prefixed('backbone.', sequential(T)),
  'lightly generator': prefixed('backbone.', sequential(shortcut(T), 2)),
  'Sequential without pooling': prefixed('f.', sequential(T, 3)),
  'Lightning': {'state_dict': prefixed('backbone.', T), 'global_step': 3, 'hyper_parameters': {'lr': 0.1}},
  'old solo-learn': {'state_dict': prefixed('encoder.', T)},
  'VISSL': {'classy_state_dict': {'base_model': {'model': {
    'trunk': prefixed('_feature_blocks.', T), 'heads': {'0.clf.0.weight': np.ones((9, D)), '1.clf.0.weight': np.ones((5, 9))},
  }}}},
  'mmselfsup': {'meta': {}, 'state_dict': prefixed('backbone.', T)},
  'VICReg': {'model': prefixed('module.backbone.', T)},
  'SwAV': prefixed('module.', {**T, 'prototypes.weight': np.ones((30, 5), np.float32)}),
  'transformers': transformers(T),
  'transformers with classifier': {
    **prefixed('resnet.', transformers(T)), 'classifier.1.weight': FC['fc.weight'], 'classifier.1.bias': FC['fc.bias'],
  },
  'SupContrast': {'model': prefixed('module.encoder.', shortcut(T))},
}  # fmt: skip


@pytest.mark.parametrize('layout', SINGLE)
def test_layouts_of_a_network(layout, tmp_path):
  """Breaks if the names of a program are not recognised, or a tensor reaches another layer."""
  path = tmp_path / 'a.pth'
  (legacy if len(layout) % 2 else pickles.write)(path, SINGLE[layout])
  (network,) = weights.networks(path, {})
  assert network.name == '' and network.model == MODEL and network.normalize == 'imagenet'
  assert_equal(network.encoder, encoder()[0])
  has_classifier = layout in ('torchvision', 'lincls', 'transformers with classifier')
  assert bool(network.classifier) == has_classifier
  if has_classifier:
    assert_equal(network.classifier, {'kernel': FC['fc.weight'].T, 'bias': FC['fc.bias']})
  left = {'VISSL': 'heads (2 tensors)', 'SwAV': 'prototypes (1 tensor)', 'lincls': 'best_acc1'}
  assert left.get(layout, '') in ' '.join(network.notes)
  assert ('left out' in ' '.join(network.notes)) == (layout in left)


T2, H = encoder(1)[1], head()[1]
MOCO = {
  **prefixed('encoder_q.', {**T, **prefixed('fc.', H)}), **prefixed('encoder_k.', {**T2, **prefixed('fc.', H)}),
  'queue': np.ones((5, 12), np.float32), 'queue_ptr': np.array([8]),
}  # fmt: skip
PAIRS = {  # name -> file, names of the networks
  'MoCo': ({'epoch': 4, 'state_dict': prefixed('module.', MOCO)}, ('encoder_q', 'encoder_k')),
  'MoCo v3': (
    {'state_dict': prefixed('module.', {
      **prefixed('base_encoder.', T), **prefixed('momentum_encoder.', T2), 'predictor.0.weight': np.ones((5, 5)),
    })}, ('base_encoder', 'momentum_encoder'),
  ),
  'DINO': (
    {'student': prefixed('module.backbone.', T), 'teacher': prefixed('backbone.', T2)}, ('student', 'teacher'),
  ),
  'BYOL': ({**prefixed('online_encoder.net.', T), **prefixed('target_encoder.net.', T2)}, ('online_encoder', 'target_encoder')),
  'BYOL, two dicts': (
    {'online_network_state_dict': prefixed('encoder.', sequential(T)), 'target_network_state_dict': prefixed('encoder.', sequential(T2))},
    ('online_network_state_dict', 'target_network_state_dict'),
  ),
  'solo-learn': (
    {'state_dict': {**prefixed('backbone.', T), **prefixed('momentum_backbone.', T2), **prefixed('projector.', H)}},
    ('backbone', 'momentum_backbone'),
  ),
  'mmselfsup MoCo': (
    {'state_dict': {
      **prefixed('encoder_q.0.', T), **prefixed('encoder_k.0.', T2), **prefixed('encoder_q.1.mlp.', H),
    }}, ('encoder_q', 'encoder_k'),
  ),
  'timm with EMA': ({'state_dict': T, 'state_dict_ema': T2}, ('state_dict', 'state_dict_ema')),
}  # fmt: skip


@pytest.mark.parametrize('layout', PAIRS)
def test_layouts_of_two_networks(layout, tmp_path):
  """Breaks if networks are mixed up, one is taken without a choice, or a head goes to the wrong network."""
  tree, names = PAIRS[layout]
  path = tmp_path / 'a.pth.tar'
  pickles.write(path, tree)
  found = weights.networks(path, {})
  assert tuple(network.name for network in found) == names
  for network, seed in zip(found, (0, 1)):
    assert_equal(network.encoder, encoder(seed)[0])
  with pytest.raises(ConfigError, match=f'choose one of {names[0]}, {names[1]}'):
    weights.load(path, {})
  with_head = {'MoCo': (True, True), 'solo-learn': (True, False), 'mmselfsup MoCo': (True, False)}
  assert tuple(n.head is not None for n in found) == with_head.get(layout, (False, False))
  if layout in with_head:
    assert_equal(found[0].head, head()[0])


ENCODERS = {
  'CIFAR stem': ({'stem': 'cifar'}, {'stem': 'cifar'}), 'strided stem': ({'stem': 'strided'}, {'stem': 'strided'}),
  'simclr 18': ({'variant': 'simclr'}, {}), 'depth 8': ({'depth': 8, 'variant': 'simclr', 'stem': 'cifar'}, {'stem': 'cifar'}),
  'wide 50': ({'depth': 50, 'width_multiplier': 0.25}, {}),
  'simclr 50': ({'depth': 50, 'variant': 'simclr'}, {'variant': 'simclr'}),
  'SK 50': ({'depth': 50, 'variant': 'simclr', 'sk_ratio': 0.0625}, {}),
  'SK 18': ({'depth': 18, 'variant': 'simclr', 'sk_ratio': 0.0625, 'stem': 'cifar'}, {'stem': 'cifar'}),
  'SE 18': ({'se_ratio': 0.25}, {}), 'SE 50': ({'depth': 50, 'se_ratio': 0.25}, {}),
}  # fmt: skip


@pytest.mark.parametrize('name', ENCODERS)
def test_architectures_are_detected(name, tmp_path):
  """Breaks if depth, width, stem, selective kernels or squeeze and excitation are not seen in the shapes."""
  model, given = ENCODERS[name]
  tree, tensors = encoder(**model)
  safetensors.save_file(tensors, tmp_path / 'a.safetensors')
  (network,) = weights.networks(tmp_path / 'a.safetensors', given)
  expected = {**MODEL, **model}
  if name == 'SK 50':
    assert network.model.pop('sk_ratio') > 0  # any value that gives 32 channels
    expected.pop('sk_ratio')
  assert network.model == expected
  assert_equal(network.encoder, tree)
  assert (network.normalize is None) == (expected['variant'] == 'simclr')  # unknown, must be given


# Heads.


def evaluated(layers, x):
  """A `torch.nn.Sequential` of layers (weight, bias) or (weight, bias, mean, var) with a ReLU after each but the last."""
  x = x.astype(np.float64)
  for i, (linear, norm) in enumerate(layers):
    x = x @ linear['weight'].T.astype(np.float64) + linear.get('bias', 0)
    if norm:
      x = (x - norm['running_mean']) / np.sqrt(norm['running_var'].astype(np.float64) + 1e-5)
      x = x * norm.get('weight', 1) + norm.get('bias', 0)
    x = np.maximum(x, 0) if i + 1 < len(layers) else x
  return x


def mlp_layers(widths, biases, norms, seed=3):
  """Layers of a head; `norms`: 'a' affine, 'p' plain, 'z' with an offset of 0, '-' none."""
  rng, layers = np.random.default_rng(seed), []
  for inputs, outputs, bias, norm in zip(widths, widths[1:], biases, norms):
    linear = {'weight': numbers((outputs, inputs), rng)}
    linear |= {'bias': numbers(outputs, rng)} if bias == 'b' else {}
    stats = {'running_mean': numbers(outputs, rng), 'running_var': numbers(outputs, rng, 'var')}
    affine = {'weight': numbers(outputs, rng), 'bias': numbers(outputs, rng) * (norm != 'z')}
    layers.append((linear, {} if norm == '-' else stats if norm == 'p' else {**affine, **stats}))
  return layers


def named(layers, place=lambda i, norm: ''):
  """Names in a `torch.nn.Sequential`, or those that `place` gives."""
  tensors, index = {}, 0
  for i, (linear, norm) in enumerate(layers):
    tensors |= prefixed(place(i, False) or f'{index}.', linear)
    tensors |= prefixed(place(i, True) or f'{index + 1}.', norm)
    index += 2 + bool(norm)
  return tensors


HEADS = {  # name -> prefix, layers, fields
  'MoCo v2': ('module.encoder_q.fc.', mlp_layers((D, D, 5), 'bb', '--'), (2, 0, 5, 'none')),
  'sthalles': ('backbone.fc.', mlp_layers((D, D, 5), 'bb', '--'), (2, 0, 5, 'none')),
  'solo-learn': ('projector.', mlp_layers((D, 20, 5), 'bb', '--'), (2, 20, 5, 'none')),
  'SimSiam': ('module.encoder.fc.', mlp_layers((D, D, D, 30), '--b', 'aap'), (3, 0, 30, 'all_last_plain')),
  'MoCo v3': ('module.base_encoder.fc.', mlp_layers((D, 40, 5), '--', 'ap'), (2, 40, 5, 'all_last_plain')),
  'Barlow Twins': ('module.projector.', mlp_layers((D, 40, 40, 40), '---', 'aa-'), (3, 40, 40, 'hidden')),
  'VICReg': ('module.projector.', mlp_layers((D, 40, 40, 40), 'bb-', 'aa-'), (3, 40, 40, 'hidden')),
  'SwAV': ('module.projection_head.', mlp_layers((D, 20, 5), 'bb', 'a-'), (2, 20, 5, 'hidden')),
  'SimCLR': ('projection_head.', mlp_layers((D, D, 5), '--', 'az'), (2, 0, 5, 'all')),
  'lightly': ('projection_head.layers.', mlp_layers((D, 20, 5), '-b', 'a-'), (2, 20, 5, 'hidden')),
}  # fmt: skip


@pytest.mark.parametrize('name', HEADS)
def test_heads_compute_what_they_did(name, tmp_path):
  """Breaks if a projection head gets another form, order or value; compared in float64."""
  prefix, layers, expected = HEADS[name]
  parent = (
    prefix.replace('projection_head.layers.', 'projection_head.').rstrip('.').rpartition('.')[0]
  )
  inside = prefix.endswith('fc.')
  place = (
    f'{parent}.' if inside else 'module.backbone.' if prefix.startswith('module') else 'backbone.'
  )
  pickles.write(tmp_path / 'a.pth', {**prefixed(place, T), **prefixed(prefix, named(layers))})
  (network,) = weights.networks(tmp_path / 'a.pth', {})
  fields = ('head_layers', 'head_hidden', 'head_dim', 'head_norm')
  assert tuple(network.model[field] for field in fields) == expected
  h = numbers((4, D), np.random.default_rng(9))
  z = mlp.head(architecture(**network.model)).apply(network.head, h, train=False)[-1]
  np.testing.assert_allclose(z, evaluated(layers, h), rtol=1e-5, atol=1e-5)
  assert not any('left out' in note for note in network.notes)


def test_heads_with_other_names(tmp_path):
  """Breaks if the layers of mmselfsup's neck, fc0, bn0, fc1, are read in alphabetical order."""
  layers = mlp_layers((D, 20, 5), '-b', 'a-')
  names = named(layers, lambda i, norm: f'{"bn" if norm else "fc"}{i}.')
  tree = {
    'state_dict': {**prefixed('backbone.', T), **prefixed('neck.', dict(sorted(names.items())))}
  }
  pickles.write(tmp_path / 'a.pth', tree)
  (network,) = weights.networks(tmp_path / 'a.pth', {})
  h = numbers((4, D), np.random.default_rng(9))
  z = mlp.head(architecture(**network.model)).apply(network.head, h, train=False)[-1]
  np.testing.assert_allclose(z, evaluated(layers, h), rtol=1e-5, atol=1e-5)


OTHER_HEADS = {
  'weight normalisation': {'mlp.0.weight': np.ones((9, D)), 'last_layer.weight_g': np.ones((9, 1))},
  'offset': named(mlp_layers((D, 20, 5), '--', 'aa')),
  'uneven': named(mlp_layers((D, 20, 30, 5), 'bbb', '---')),
  'other input': named(mlp_layers((D + 1, 20, 5), 'bb', '--')),
  'BatchNorm only in the middle': named(mlp_layers((D, 20, 20, 5), 'bbb', '-a-')),
  'no activation': {'0.weight': np.ones((9, D)), '1.weight': np.ones((5, 9))},
  'too deep': named(mlp_layers((D, 9, 9, 9, 9, 9), 'bbbbb', '-----')),
  'convolutions': {'0.weight': np.ones((9, D, 1, 1))},
}


@pytest.mark.parametrize('name', OTHER_HEADS)
def test_other_heads_are_named(name, tmp_path):
  """Breaks if a head that this package cannot express is approximated or dropped silently."""
  tree = {**prefixed('backbone.', T), **prefixed('head.', OTHER_HEADS[name])}
  pickles.write(tmp_path / 'a.pth', tree)
  (network,) = weights.networks(tmp_path / 'a.pth', {})
  n = len(OTHER_HEADS[name])
  assert network.head is None and f'left out: head ({n} tensor' in network.notes[-1]


# MoCo's state.


def moco_file(**changes):
  learned = [n for n in (*T, *prefixed('fc.', H)) if n.split('.')[-1] in ('weight', 'bias')]
  shapes = {**T, **prefixed('fc.', H)}
  order = list(range(2 * len(learned)))
  state = {
    i: {'momentum_buffer': shapes[name] * 0 + np.float32(i)} for i, name in enumerate(learned)
  }
  rows = np.random.default_rng(2).random((12, 5), np.float32)
  tree = {
    'epoch': 4, 'state_dict': prefixed('module.', {**MOCO, 'queue': np.ascontiguousarray(rows.T)}),
    'optimizer': {'state': state, 'param_groups': [{'lr': 0.03, 'params': order}]}, **changes,
  }  # fmt: skip
  return tree, rows, learned


@pytest.mark.parametrize('writer', (legacy, pickles.write))
def test_a_training_of_moco_can_go_on(writer, tmp_path):
  """Breaks if queue, pointer, key encoder, momentum or epoch are lost or reach another place."""
  tree, rows, learned = moco_file()
  writer(tmp_path / 'a.pth.tar', tree)
  state = layouts.moco_state(tmp_path / 'a.pth.tar', {})
  np.testing.assert_array_equal(state['queue'], rows)
  assert state['queue'].flags.c_contiguous and (state['pointer'], state['epoch']) == (8, 4)
  assert_equal(
    state['key']['params'], {'encoder': encoder(1)[0]['params'], 'head': head()[0]['params']}
  )
  assert_equal(state['key']['batch_stats'], {'encoder': encoder(1)[0]['batch_stats'], 'head': {}})
  momentum = state['momentum']
  assert jax.tree.map(np.shape, momentum) == jax.tree.map(
    np.shape, {'encoder': encoder()[0]['params'], 'head': head()[0]['params']}
  )
  block = momentum['encoder']['group2_block1']
  assert (block['conv1']['kernel'] == learned.index('layer2.0.conv1.weight')).all()
  assert (block['proj_bn']['bias'] == learned.index('layer2.0.downsample.1.bias')).all()
  assert (momentum['head']['dense2']['bias'] == len(learned) - 1).all()


@pytest.mark.parametrize('change, error', [
  ({'optimizer': None}, 'no state of SGD'), ({'optimizer': {'state': {}, 'param_groups': [{'params': [0]}]}}, 'lacks conv1.weight'),
  ({'optimizer': {'state': {}, 'param_groups': []}}, 'one group'), ({'epoch': 'x'}, 'number of epochs'),
  ({'state_dict': {**MOCO, 'queue': np.ones((6, 12), np.float32)}}, 'shape .6, 12'),
  ({'state_dict': {**MOCO, 'queue_ptr': np.array([12])}}, 'out of range'),
  ({'state_dict': {**prefixed('encoder_q.', T), 'queue': MOCO['queue']}}, 'not both encoders'),
])  # fmt: skip
def test_a_training_that_lacks_a_part_is_refused(change, error, tmp_path):
  """Breaks if a training goes on without a part of its state, or a missing part is a traceback."""
  pickles.write(tmp_path / 'a.pth', moco_file(**change)[0])
  with pytest.raises(ConfigError, match=error):
    layouts.moco_state(tmp_path / 'a.pth', {})


def test_moco_v1_has_a_linear_head(tmp_path):
  """Breaks if the single layer of MoCo v1 is taken for a classifier, or a file without a queue for a training."""
  fc = {'encoder_q.fc.weight': FC['fc.weight'][:5], 'encoder_q.fc.bias': FC['fc.bias'][:5]}
  pickles.write(tmp_path / 'a.pth', {**prefixed('encoder_q.', T), **fc, 'queue': MOCO['queue']})
  (network,) = weights.networks(tmp_path / 'a.pth', {})
  assert (
    network.model['head'] == 'linear' and network.model['head_dim'] == 5 and not network.classifier
  )
  assert_equal(
    network.head,
    {'params': {'dense1': {'kernel': FC['fc.weight'][:5].T, 'bias': FC['fc.bias'][:5]}}},
  )
  pickles.write(tmp_path / 'b.pth', T)
  assert layouts.moco_state(tmp_path / 'b.pth', {}) is None


# Refusals.

SHAPE = T['layer2.0.conv1.weight'].shape
WRONG = {  # name -> tensors, given, error
  'missing': ({k: x for k, x in T.items() if k != 'layer3.1.bn2.running_var'}, {}, 'lacks layer3.1.bn2.running_var'),
  'extra': ({**T, 'layer1.0.conv4.weight': T['conv1.weight']}, {}, 'also has layer1.0.conv4.weight'),
  'unknown module': ({**T, 'attnpool.weight': T['conv1.weight']}, {}, 'also has attnpool.weight'),
  'shape': ({**T, 'layer2.0.conv1.weight': np.ones((1, *SHAPE[1:]))}, {}, 'layer2.0.conv1.weight is'),
  'scalar': ({**T, 'conv1.weight': np.array(3.0)}, {}, 'conv1.weight has the shape'),
  'integers': ({**T, 'bn1.weight': T['bn1.weight'].astype(np.int64)}, {}, 'has the dtype int64'),
  'NaN': ({**T, 'bn1.weight': T['bn1.weight'] * np.nan}, {}, 'not finite'),
  'no stem': ({k: x for k, x in T.items() if k != 'conv1.weight'}, {}, 'lacks conv1.weight'),
  'grey': ({**T, 'conv1.weight': T['conv1.weight'][:, :1]}, {}, 'only networks for RGB'),
  'ask stem': (encoder(stem='cifar')[1], {}, 'stride 1'), 'other stem': (T, {'stem': 'cifar'}, 'stem is imagenet'),
  'other variant': (T, {'variant': 'simclr'}, 'variant is torchvision'),
  'converted': (encoder(variant='simclr')[1], {'variant': 'torchvision'}, 'variant is simclr'),
  'depth': ({k: x for k, x in T.items() if not k.startswith('layer4.1')}, {}, 'none of ResNet-8'),
  'ResNeXt': ({**T, 'layer1.0.conv2.weight': T['layer1.0.conv2.weight'][:, :1]}, {}, 'ResNeXt'),
  'wide_resnet': (
    {**encoder(depth=50)[1], 'layer1.0.conv1.weight': np.ones((16, 8, 1, 1)), 'layer1.0.conv2.weight': np.ones((16, 16, 3, 3))},
    {}, 'wide_resnet',
  ),
  'ResNet-D': (
    {**{k: x for k, x in T.items() if not k.startswith('layer2.0.down')}, 'layer2.0.downsample.1.weight': np.ones((16, 8, 1, 1))},
    {}, 'ResNet-D',
  ),
  'ViT': ({'blocks.0.attn.qkv.weight': np.ones(3), 'patch_embed.proj.weight': np.ones(3)}, {}, 'Vision Transformer'),
  'nothing': ({'w': np.ones(3)}, {}, 'no ResNet: its tensors are w'), 'empty': ({}, {}, 'there are no tensors'),
  'long name': ({'a' * 2000: {'b': np.ones(3)}}, {}, '1,000 characters'),
  'many': ({f'{i}.layer1.0.conv1.weight': np.ones(1) for i in range(40)}, {}, '40 ResNets'),
  'escape': ({'\x1b.layer1.0.conv1.weight': np.ones(1), 'a.layer1.0.conv1.weight': np.ones(1)}, {}, 'x1b'),
  'twice': ({'a': {'b': np.ones(3)}, 'a.b': np.ones(3)}, {}, 'twice'),
}  # fmt: skip


@pytest.mark.parametrize('name', WRONG)
def test_other_networks_are_refused(name, tmp_path):
  """Breaks if a tensor is dropped or invented, or another network is read as one of this package."""
  tensors, given, error = WRONG[name]
  pickles.write(tmp_path / 'a.pth', tensors)
  with pytest.raises(ConfigError, match=error) as raised:
    weights.networks(tmp_path / 'a.pth', given)
  assert (
    '\n' not in str(raised.value)
    and str(tmp_path) in str(raised.value)
    and len(str(raised.value)) < 700
  )


def folder(path, tensors, metadata=None, **contents):
  path.mkdir()
  safetensors.save_file(tensors, path / 'model.safetensors', metadata)
  for name, value in contents.items():
    (path / f'{name}.json').write_text(json.dumps(value))
  return path


CIFAR = {'mean': [0.4914, 0.4822, 0.4465], 'std': [0.2023, 0.1994, 0.201]}
FOLDERS = {
  'timm': (T, {'config': {'architecture': 'resnet18', 'pretrained_cfg': CIFAR}}, 'cifar10'),
  'not normalised': (T, {'config': {'architecture': 'resnet18.x', 'pretrained_cfg': {'mean': [0] * 3, 'std': [1] * 3}}}, 'none'),
  'transformers': (
    prefixed('resnet.', transformers(T)),
    {'config': {'model_type': 'resnet'}, 'preprocessor_config': {'image_mean': [0.485, 0.456, 0.406], 'image_std': [0.229, 0.224, 0.225]}},
    'imagenet',
  ),
  'ViT': (T, {'config': {'model_type': 'vit'}}, 'contains a vit'),
  'blur': (T, {'config': {'architecture': 'resnetblur18'}}, 'resnetblur18'),
  'stride': (transformers(T), {'config': {'model_type': 'resnet', 'downsample_in_bottleneck': True}}, 'downsample_in_bottleneck'),
  'mean': (T, {'config': {'architecture': 'resnet18', 'pretrained_cfg': {'mean': [0.5] * 3, 'std': [0.5] * 3}}}, 'mean'),
  'damaged': (T, {'config': [1]}, 'no object'),
  'words': (T, {'config': {'pretrained_cfg': {'mean': ['a'] * 3, 'std': None}}}, 'mean'),
}  # fmt: skip


@pytest.mark.parametrize('name', FOLDERS)
def test_folders_of_hugging_face(name, tmp_path):
  """Breaks if the preprocessing beside the weights is not used, or another network with the same names is read."""
  tensors, contents, expected = FOLDERS[name]
  path = folder(tmp_path / 'a', tensors, **contents)
  if expected in ('cifar10', 'none', 'imagenet'):
    for place in (path, path / 'model.safetensors'):
      (network,) = weights.networks(place, {})
      assert network.normalize == expected and not network.notes
      assert_equal(network.encoder, encoder()[0])
  else:
    with pytest.raises(ConfigError, match=expected):
      weights.networks(path, {})


def test_exports_of_this_package_say_what_shapes_do_not(tmp_path):
  """Breaks if an exported network comes back with another stem, variant or normalisation."""
  tree, tensors = encoder(depth=50, variant='simclr', stem='strided')
  about = {'architecture': architecture(depth=50, variant='simclr', stem='strided')}
  folder(tmp_path / 'a', tensors, {'simclr_jax': json.dumps(about)})
  (network,) = weights.networks(tmp_path / 'a', {})
  assert (network.model['stem'], network.model['variant'], network.normalize) == (
    'strided',
    'simclr',
    'none',
  )
  assert_equal(network.encoder, tree)
  with pytest.raises(ConfigError, match='as the file says, not torchvision'):
    weights.networks(tmp_path / 'a', {'variant': 'torchvision'})
  damaged = folder(tmp_path / 'b', T, {'simclr_jax': '[' * 2000})
  assert weights.networks(damaged, {})[0].normalize == 'imagenet'


# The formats.


def expected_tree():
  """What PyTorch saved in tests/data/torch_*.pth, see there for the views."""
  base = np.arange(24, dtype=np.float32).reshape(4, 6)
  dtypes = (
    'float64',
    'float32',
    'float16',
    'bfloat16',
    'int64',
    'int32',
    'int16',
    'int8',
    'uint8',
    'bool',
    'complex64',
  )
  return {
    'epoch': 3, 'arch': 'resnet18', 'rate': 0.1, 'none': None, 'flag': True, 'list': [1, 'a', (2.5,)], 'text': '猫', 'big': 2**70,
    'state_dict': {
      'weight': np.ones(2, np.float32), 'bias': np.zeros(2, np.float32), 'running_mean': np.zeros(2, np.float32),
      'running_var': np.ones(2, np.float32), 'num_batches_tracked': np.zeros((), np.int64),
    },
    'base': base, 'slice': base[1:3, ::2], 'transposed': base.T, 'expanded': np.repeat(base[:1], 3, 0),
    'empty': np.zeros((0, 3), np.float32), 'scalar': np.array(7), 'parameter': np.arange(3, dtype=np.float32),
    'size': (1, 2), 'device': 'cuda:0', 'dtype': 'torch.float16', **{d: np.arange(3).astype(d) for d in dtypes},
  }  # fmt: skip


def assert_same_tree(found, wanted):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert type(x) is type(y) and (not isinstance(x, np.ndarray) or x.dtype == y.dtype)
    np.testing.assert_array_equal(x, y)


def test_files_that_pytorch_wrote():
  """Breaks if a value, dtype or view in a file of torch.save, zip or legacy, is read differently."""
  assert_same_tree(pickles.read(DATA / 'torch_legacy.pth'), expected_tree())
  more = {'uint16': np.arange(3, dtype=np.uint16), 'bytes': np.arange(8, dtype=np.uint8)}
  assert_same_tree(pickles.read(DATA / 'torch_zip.pth'), {**expected_tree(), **more})


def test_written_files_are_read_back(tmp_path):
  """Breaks if `write` changes a value, or writes an array that is not contiguous in the wrong order."""
  tree = {
    k: v
    for k, v in expected_tree().items()
    if not isinstance(v, np.ndarray) or v.dtype != np.uint16
  }
  tree |= {
    'negative': -(2**40),
    'no items': {},
    'empty list': [],
    'strides': np.arange(6.0).reshape(2, 3).T,
    'numbers': {1: {2: 'x'}},
  }
  pickles.write(tmp_path / 'a.pth', tree)
  assert_same_tree(pickles.read(tmp_path / 'a.pth'), tree)
  with pytest.raises(TypeError, match='not written'):
    pickles.write(tmp_path / 'b.pth', {'a': object()})
  assert not (tmp_path / 'b.pth').exists()


def test_safetensors(tmp_path):
  """Breaks if a dtype or the metadata of a safetensors file is lost, or damage is a traceback."""
  arrays = {
    'a': np.arange(3).astype(ml_dtypes.bfloat16),
    'b': np.ones((2, 2), np.float16),
    'c': np.array(3),
  }
  path = tmp_path / 'a.safetensors'
  path.write_bytes(safetensors.save(arrays, {'format': 'pt'}))
  found, metadata = pickles.read_safetensors(path)
  assert metadata == {'format': 'pt'}
  assert_same_tree(found, arrays)
  data = path.read_bytes()
  for bad in (
    b'',
    data[:-1],
    data[:20],
    data + b'x',
    b'\xff' * 8 + data[8:],
    b'<html>',
    data.replace(b'"BF16"', b'"XXXX"'),
  ):
    path.write_bytes(bad)
    with pytest.raises(ConfigError, match='a.safetensors'):
      pickles.read_safetensors(path)


# Damaged and hostile files.


def archive(contents, storages=(), order='little', name='a/byteorder', **options):
  """The bytes of a zip archive like those of torch.save, with this pickle."""
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w', **options) as z:
    z.writestr('a/data.pkl', contents)
    z.writestr(name, order)
    for i, data in enumerate(storages):
      z.writestr(f'a/data/{i}', data)
  return file.getvalue()


def call(module, name, argument=b'X\x01\x00\x00\x00a'):
  return b'\x80\x02c' + f'{module}\n{name}\n'.encode() + argument + b'\x85R.'


def view(offset, shape, strides, size=4, function=b'_rebuild_tensor_v2'):
  """A pickle of a view of a storage of `size` float32."""
  numbers = b''.join(pickles._pickled(x, []) for x in (offset, shape, strides))
  storage = b'(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu'
  storage += pickles._pickled(size, []) + b'tQ'
  return b'\x80\x02ctorch._utils\n' + function + b'\n(' + storage + numbers + b'\x89}tR.'


def nested(depth):
  return b'\x80\x02' + b']' * depth + b'a' * (depth - 1) + b'.'


DOUBLED = b''.join(
  b'(' + b'h\x00' * 10 + b'lq\x00' for _ in range(30)
)  # each list contains the previous one ten times
TUPLES = b''.join(b'h\x00h\x00\x86q\x000' for _ in range(60))
FOUR = [np.arange(4, dtype=np.float32).tobytes()]
HOSTILE = {  # name -> bytes, error
  'os.system': (archive(call('os', 'system')), 'contains os.system.*weights_only=False.*save_file'),
  'eval': (archive(call('builtins', 'eval')), 'builtins.eval'),
  'getattr': (archive(call('builtins', 'getattr')), 'builtins.getattr'),
  'torch.load': (archive(call('torch', 'load')), 'torch.load'),
  'ours': (archive(call('simclr_jax.runtime.files', 'write_text')), 'write_text'),
  'hparams': (archive(call('lightning_fabric.utilities.data', 'AttributeDict')), 'AttributeDict'),
  'module': (archive(b'\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81}b.'), 'whole module'),
  'sparse': (archive(call('torch._utils', '_rebuild_sparse_tensor')), 'sparse or quantised'),
  'quantised': (archive(call('torch._utils', '_rebuild_qtensor')), 'sparse or quantised'),
  'escape': (archive(b'\x80\x02c\x1b[2J\nx\n.'), 'contains'),
  'instance': (archive(b'\x80\x02(cos\nsystem\nX\x01\x00\x00\x00ao.'), 'contains os.system'),
  'inst': (archive(b'(X\x01\x00\x00\x00aios\nsystem\n.'), 'INST'),
  'extension': (archive(b'\x80\x02\x82\x01.'), 'EXT1'),
  'text called': (archive(b'\x80\x02X\x01\x00\x00\x00a)R.'), 'instead of _Function'),
  'build on a function': (archive(b'\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.'), 'instead of dict'),
  'beyond': (archive(view(1, (4,), (1,)), FOUR), 'reaches beyond'),
  'strides': (archive(view(0, (2, 2), (3, 1)), FOUR), 'reaches beyond'),
  'negative offset': (archive(view(-1, (2,), (1,)), FOUR), 'negative'),
  'negative stride': (archive(view(3, (2,), (-1,)), FOUR), 'negative'),
  'negative shape': (archive(view(0, (-1,), (1,)), FOUR), 'negative'),
  'huge offset': (archive(view(2**62, (2,), (2**62,)), FOUR), 'reaches beyond'),
  'huge overlap': (archive(view(0, (10**6, 10**6), (0, 0)), FOUR), 'larger than the file'),
  'huge empty': (archive(view(0, (2**62, 2**62, 0), (0, 0, 0)), FOUR), 'damaged'),
  'text as shape': (archive(view(0, ('a',), (1,)), FOUR), 'no numbers'),
  'dimensions': (archive(view(0, (2, 2), (1,)), FOUR), 'another number of strides'),
  'huge storage': (archive(view(0, (4,), (1,), 2**60), FOUR), 'larger than the file'),
  'negative storage': (archive(view(0, (0,), (1,), -4), FOUR), 'values'),
  'short storage': (archive(view(0, (4,), (1,)), [b'abc']), '3 bytes instead of 16'),
  'no storage': (archive(view(0, (4,), (1,))), 'damaged'),
  'compressed': (archive(view(0, (4,), (1,)), [bytes(10**6)], compression=zipfile.ZIP_DEFLATED), 'compressed'),
  'no pickle': (archive(b'').replace(b'data.pkl', b'data.pkx'), 'no data.pkl'),
  'big-endian': (archive(view(0, (4,), (1,)), FOUR, 'big'), 'not little-endian'),
  'deep': (archive(nested(5000)), 'levels deep'), 'deeper': (archive(nested(10**5)), 'levels deep'),
  'itself': (archive(b'\x80\x02]q\x00h\x00a.'), 'levels deep'),
  'doubled': (archive(b'\x80\x02]q\x00' + DOUBLED + b'.'), 'more than 1,000,000 values'),
  'key of tuples': (archive(b'\x80\x02}K\x01q\x000' + TUPLES + b'h\x00K\x01s.'), 'key of the type tuple'),
  'marks': (archive(b'\x80\x02' + b'N' * 10**6 + b'(1' * 10**5), 'damaged'),
  'instructions': (archive(b'\x80\x02' + b'N0' * 3 * 10**6 + b'.'), 'instructions'),
  'huge text': (archive(b'\x80\x02\x8d' + struct.pack('<Q', 2**60) + b'a.'), 'damaged'),
  'memo': (archive(b'\x80\x02]r\xff\xff\xff\xffX\x01\x00\x00\x00a0j\x01\x00\x00\x00.'), 'damaged'),
  'no end': (archive(b'\x80\x02]'), 'damaged'), 'empty stack': (archive(b'\x80\x02.'), 'damaged'),
  'not a mapping': (archive(b'\x80\x02K\x01.'), 'no ResNet'),
  'empty': (b'', 'is empty'), 'page': (b'\n <!DOCTYPE html><html>', 'a page of HTML'),
  'Git LFS': (b'version https://git-lfs.github.com/spec/v1\noid sha256:1\n', 'git lfs pull'),
  'gzip': (b'\x1f\x8b' + bytes(50), 'gzip'), 'HDF5': (b'\x89HDF\r\n\x1a\n', 'HDF5'), 'text': (b'hello', 'begins with'),
  'tar': (b'a' + bytes(256) + b'ustar' + bytes(250), 'tar'), 'other pickle': (pickle.dumps({'a': 1}), 'not of torch.save'),
  'TorchScript': (archive(b'', name='a/constants.pkl'), 'program of TorchScript'),
}  # fmt: skip


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_files_are_one_sentence(name, tmp_path):
  """Breaks if a file executes code, takes memory or time beyond its size, or is a traceback."""
  data, error = HOSTILE[name]
  (tmp_path / 'a.pth').write_bytes(data)
  with pytest.raises(ConfigError, match=error) as raised:
    weights.networks(tmp_path / 'a.pth', {})
  assert str(raised.value).isprintable() and len(str(raised.value)) < 700


def test_overlapping_views_are_read(tmp_path):
  """Breaks if a view that shares values with itself or another tensor is refused or wrong."""
  (tmp_path / 'a.pth').write_bytes(archive(view(0, (3, 2), (1, 1)), FOUR))
  np.testing.assert_array_equal(pickles.read(tmp_path / 'a.pth'), [[0, 1], [1, 2], [2, 3]])
  (tmp_path / 'a.pth').write_bytes(
    archive(view(1, (2, 2), (0, 2), function=b'_rebuild_tensor')[:-4] + b'tR.', FOUR)
  )
  np.testing.assert_array_equal(pickles.read(tmp_path / 'a.pth'), [[1, 3], [1, 3]])


def test_overlapping_members_are_refused(tmp_path):
  """Breaks if the members of an archive may share their bytes, and so need more memory than the file."""
  data = bytearray(archive(view(0, (4,), (1,)), [bytes(1000)] * 2))
  entries = [i for i in range(len(data)) if data.startswith(b'PK\x01\x02', i)]
  for entry in entries[-2:]:  # sizes in the directory
    data[entry + 20 : entry + 28] = struct.pack('<II', 900, 900)
  (tmp_path / 'a.pth').write_bytes(data)
  with pytest.raises(ConfigError):
    pickles.read(tmp_path / 'a.pth')
  for entry in entries[-2:]:
    data[entry + 20 : entry + 28] = struct.pack('<II', 2**31, 2**31)
  (tmp_path / 'a.pth').write_bytes(data)
  with pytest.raises(ConfigError, match='larger than the archive'):
    pickles.read(tmp_path / 'a.pth')


@pytest.mark.parametrize('name', ('torch_legacy.pth', 'torch_zip.pth'))
def test_truncated_files_and_flipped_bits(name, tmp_path):
  """Breaks if a damaged file is a traceback, if its end may be missing, or a flipped bit of a zip goes unseen."""
  data = (DATA / name).read_bytes()
  path = tmp_path / 'a.pth'
  for end in range(0, len(data), 37):
    path.write_bytes(data[:end])
    with pytest.raises(ConfigError):
      pickles.read(path)
  wanted, rng, unseen = pickles.read(DATA / name), np.random.default_rng(0), 0
  for i in range(0, len(data), 11):
    damaged = bytearray(data)
    damaged[i] ^= 1 << rng.integers(8)
    path.write_bytes(damaged)
    try:
      found = pickles.read(path)
    except ConfigError as error:
      assert str(error).isprintable()
      continue
    if 'zip' in name:  # the rest of the archive: padding, times, flags
      assert_same_tree(found, wanted)
    unseen += 1
  assert unseen < len(data) / 11 * 0.8


def test_no_file_and_folders_without_weights(tmp_path):
  """Breaks if a path without weights is a traceback."""
  with pytest.raises(ConfigError, match='does not exist'):
    pickles.read(tmp_path / 'no.pth')
  with pytest.raises(ConfigError, match='has no model.safetensors'):
    layouts.networks(tmp_path, {})
  for name in ('a.pth', 'b.pth'):
    pickles.write(tmp_path / name, T)
  with pytest.raises(ConfigError, match='2 files of weights'):
    layouts.networks(tmp_path, {})
  with pytest.raises(ConfigError, match='regular file'):
    pickles.read(tmp_path)


# Files that the libraries write, and what they compute.


@pytest.fixture
def torch():
  return pytest.importorskip('torch', reason=REASON)


def with_numbers(torch, module, seed=0):
  """The module in evaluation mode; BatchNorm has seeded numbers that are not 0 and 1."""
  torch.manual_seed(seed)
  for layer in module.modules():
    if isinstance(layer, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
      torch.nn.init.uniform_(layer.running_mean, -0.2, 0.2)
      torch.nn.init.uniform_(layer.running_var, 0.5, 1.5)
      if layer.affine:
        torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
        torch.nn.init.uniform_(layer.bias, -0.2, 0.2)
  return module.eval()


def assert_computes(torch, network, compute, size=65):
  """The features of a network are those of `compute(images in the layout of PyTorch)`."""
  x = images(size)
  with torch.no_grad():
    wanted = compute(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).flatten(1).numpy()
  found = features(network.model, network.encoder, x)
  assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


def torchvision_network(torch, name='resnet18', **options):
  models = pytest.importorskip('torchvision', reason=REASON).models
  return with_numbers(torch, getattr(models, name)(**options))


def without_top(torch, network):
  return torch.nn.Sequential(*list(network.children())[:-1])


@pytest.mark.parametrize('new', (True, False), ids=('zip', 'legacy'))
@pytest.mark.parametrize('name', ('resnet18', 'resnet50'))
def test_torchvision_computes_the_same(name, new, torch, tmp_path):
  """Breaks if the features of weights that torchvision saved differ from torchvision's."""
  net = torchvision_network(torch, name)
  path = tmp_path / 'a.pth.tar'
  tree = {'state_dict': torch.nn.DataParallel(net).state_dict(), 'epoch': 3}
  torch.save(tree, path, _use_new_zipfile_serialization=new)
  network = weights.load(path, {})
  assert_computes(torch, network, without_top(torch, net))
  assert network.classifier['kernel'].shape == (net.fc.in_features, 1000)


def test_half_precision(torch, tmp_path):
  """Breaks if bfloat16 or float16 weights are read as other numbers."""
  net = torchvision_network(torch)
  for dtype in (torch.bfloat16, torch.float16):
    net = net.to(dtype)
    torch.save(net.state_dict(), tmp_path / 'a.pth')
    pytest.importorskip('safetensors.torch').save_file(net.state_dict(), tmp_path / 'a.safetensors')
    for name in ('a.pth', 'a.safetensors'):
      assert_computes(torch, weights.load(tmp_path / name, {}), without_top(torch, net.float()))


@pytest.mark.parametrize('children', ('all', 'without pooling'))
def test_a_sequential_of_children_computes_the_same(children, torch, tmp_path):
  """Breaks if the numbers of a torch.nn.Sequential are taken for other layers."""
  net = torchvision_network(torch)
  if children != 'all':
    net.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
  kept = [m for m in net.children() if children == 'all' or not isinstance(m, torch.nn.MaxPool2d)]
  net = torch.nn.Sequential(*kept[:-1])
  torch.save({'state_dict': prefixed('backbone.', net.state_dict())}, tmp_path / 'a.ckpt')
  given = {} if children == 'all' else {'stem': 'cifar'}
  assert_computes(torch, weights.load(tmp_path / 'a.ckpt', given), net, 33)


@pytest.mark.parametrize('name', ('resnet50', 'seresnet50'))
def test_timm_computes_the_same(name, torch, tmp_path):
  """Breaks if the features of a folder that timm wrote differ from timm's."""
  timm = pytest.importorskip('timm', reason=REASON)
  net = with_numbers(torch, timm.create_model(name, num_classes=7))
  timm.models.save_for_hf(net, tmp_path / 'a', model_config=None)
  network = weights.load(tmp_path / 'a', {})
  assert network.normalize == 'imagenet' and not network.notes
  assert_computes(
    torch, network, lambda x: net.forward_head(net.forward_features(x), pre_logits=True)
  )


@pytest.mark.parametrize('depth', (18, 50))
def test_transformers_computes_the_same(depth, torch, tmp_path):
  """Breaks if the features of a folder that transformers wrote differ from those of transformers."""
  transformers = pytest.importorskip('transformers', reason=REASON)
  bottleneck = depth == 50
  config = transformers.ResNetConfig(
    depths=[3, 4, 6, 3] if bottleneck else [2, 2, 2, 2], embedding_size=16,
    hidden_sizes=[(64 if bottleneck else 16) * 2**i for i in range(4)], layer_type='bottleneck' if bottleneck else 'basic',
    num_labels=7,
  )  # fmt: skip
  net = with_numbers(torch, transformers.ResNetForImageClassification(config))
  for module, name in ((net, 'a'), (net.resnet, 'b')):
    module.save_pretrained(tmp_path / name)
    network = weights.load(tmp_path / name, {})
    assert network.model['width_multiplier'] == 0.25 and network.model['depth'] == depth
    assert_computes(torch, network, lambda x: net.resnet(x).pooler_output)


def test_moco_in_pytorch_goes_on(torch, tmp_path):
  """Breaks if the momentum of a parameter of PyTorch's SGD, found by its name, reaches another variable."""
  net = torch.nn.Module()
  for name in ('encoder_q', 'encoder_k'):
    encoder = torchvision_network(torch, num_classes=8).train()
    encoder.fc = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), encoder.fc)
    setattr(net, name, encoder)
  for parameter in net.encoder_k.parameters():
    parameter.requires_grad = False
  net.register_buffer('queue', torch.randn(8, 16))
  net.register_buffer('queue_ptr', torch.tensor([4]))
  optimizer = torch.optim.SGD(net.parameters(), 0.03, 0.9)
  for _ in range(2):
    optimizer.zero_grad()
    net.encoder_q(torch.randn(4, 3, 33, 33)).square().sum().backward()
    optimizer.step()
  tree = {
    'epoch': 2, 'arch': 'resnet18', 'state_dict': torch.nn.DataParallel(net).state_dict(), 'optimizer': optimizer.state_dict(),
  }  # fmt: skip
  torch.save(tree, tmp_path / 'a.pth.tar', _use_new_zipfile_serialization=False)
  state = layouts.moco_state(tmp_path / 'a.pth.tar', {})
  network = weights.load(tmp_path / 'a.pth.tar', {}, 'encoder_q')
  np.testing.assert_array_equal(state['queue'], net.queue.numpy().T)
  a = architecture(**network.model)
  parts = {'encoder': torch_names.encoder(a), 'head': torch_names.head(a, 512)}
  parameters = dict(net.encoder_q.named_parameters())
  checked = 0
  for part, tensors in parts.items():
    own = [t for t in tensors if t.path[0] == 'params']
    found = torch_names.to_torch(own, {'params': state['momentum'][part]})
    for name, x in found.items():
      parameter = parameters[name if part == 'encoder' else f'fc.{name}']
      np.testing.assert_array_equal(x, optimizer.state[parameter]['momentum_buffer'].numpy())
      checked += 1
  assert checked == len(parameters)
  assert_computes(torch, network, without_top(torch, net.encoder_q.eval()))


def test_pytorch_reads_what_is_written(torch, tmp_path):
  """Breaks if torch.load with weights_only, also with mmap, does not read a written file as it is."""
  tree = moco_file()[0] | {
    'empty': {},
    'half': np.ones(2, np.float16),
    'T': np.arange(6.0).reshape(2, 3).T,
    'big': 2**70,
  }
  pickles.write(tmp_path / 'a.pth', tree)
  for options in ({}, {'mmap': True}):
    found = torch.load(tmp_path / 'a.pth', weights_only=True, **options)
    assert_same_tree(
      jax.tree.map(lambda x: x.numpy() if isinstance(x, torch.Tensor) else x, found), tree
    )


@pytest.mark.parametrize('new', (True, False), ids=('zip', 'legacy'))
def test_objects_that_pytorch_saves_are_refused(new, torch, tmp_path):
  """Breaks if objects, of a module or a program, are read, or a refusal is a traceback."""
  import argparse

  objects = {
    'Linear': torch.nn.Linear(1, 1),
    'sparse': torch.eye(3).to_sparse(), 'conjugate': torch.ones(2, dtype=torch.complex64).conj(),
    'Sequential': torchvision_network(torch).layer1, 'dtype O8': np.array([{}], object),
  }  # fmt: skip
  for name, value in objects.items():
    torch.save(
      {'state_dict': {}, 'x': value}, tmp_path / 'a.pth', _use_new_zipfile_serialization=new
    )
    with pytest.raises(ConfigError, match=f'contains .*{name}'):
      pickles.read(tmp_path / 'a.pth')
  arguments = argparse.Namespace(lr=1, out=pathlib.Path('/a/b'))
  tree = {'x': np.float64(2.5), 'y': np.arange(3), 'args': arguments, 'path': pathlib.Path('a/b')}
  torch.save(tree, tmp_path / 'a.pth', _use_new_zipfile_serialization=new)
  expected = {'x': 2.5, 'y': np.arange(3), 'args': {}, 'path': 'a/b'}
  assert_same_tree(pickles.read(tmp_path / 'a.pth'), expected)
