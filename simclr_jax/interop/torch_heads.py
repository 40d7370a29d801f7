"""Projection heads and classifiers in files of PyTorch: linear layers, BatchNorm and ReLU in a row."""

import dataclasses
import re
from typing import Any

import numpy as np

from simclr_jax.interop import assemble, torch_names

PyTree = Any
Tensors = dict[str, np.ndarray]

LEAVES = {'weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'}
HEAD_LAYERS = 4  # most layers of a head


@dataclasses.dataclass
class Layer:
  """A linear layer, the BatchNorm that follows, and the place of the latter or the former in a `torch.nn.Sequential`."""

  linear: Tensors
  norm: Tensors
  end: int


def layers(tensors: Tensors) -> list[Layer]:
  """The layers of an MLP with a ReLU after each but the last; empty if the tensors are none."""
  groups: dict[str, Tensors] = {}
  for name, array in tensors.items():
    module, _, leaf = name.rpartition('.')
    groups.setdefault(module, {})[leaf] = array
  parents = {name.rpartition('.')[0] for name in groups}
  matches = {name: re.fullmatch(r'([a-z_]*)(\d*)', name.split('.')[-1]) for name in groups}
  if (
    len(parents) != 1
    or not all(matches.values())
    or any(g.keys() - LEAVES for g in groups.values())
  ):
    return []
  order = {
    name: (int(match[2] or 0), 'running_mean' in groups[name])
    for name, match in matches.items()
    if match
  }
  sequential = all(match and not match[1] for match in matches.values())
  found: list[Layer] = []
  for name in sorted(groups, key=lambda name: order[name]):
    number, is_norm = order[name]
    group = {leaf: x for leaf, x in groups[name].items() if leaf != 'num_batches_tracked'}
    if is_norm:
      if not found or found[-1].norm or (sequential and number != found[-1].end + 1):
        return []
      found[-1].norm, found[-1].end = group, number
    elif np.ndim(group.get('weight', 0)) != 2 or (
      # The place between two layers is that of the ReLU.
      sequential and found and number != found[-1].end + 2
    ):
      return []
    else:
      found.append(Layer(group, {}, number))
  return found if len(set(order.values())) == len(order) else []


def classifier(layer: Layer, features: int, what: str) -> PyTree | None:
  """`kernel` and `bias` of a linear classifier of the features; None if the layer is none."""
  classes, inputs = layer.linear['weight'].shape
  if inputs != features:
    return None
  tensors = {'bias': np.zeros(classes), **layer.linear, 'weight': layer.linear['weight'].T}
  return assemble.classifier(tensors, ('weight', 'bias'), {features}, what)


def head(layers: list[Layer], model, what: str) -> tuple[dict[str, Any], PyTree, list[str]] | None:
  """A projection head: its `model.*` fields, its flax variables and notes; None if `mlp.MLP` cannot express the head."""
  features = assemble.features(model)
  widths = [layer.linear['weight'].shape for layer in layers]
  inputs = [features, *(outputs for outputs, _ in widths[:-1])]
  norm = _norm(layers)
  hidden = set(inputs[1:])
  if not norm or len(layers) > HEAD_LAYERS or len(hidden) > 1 or [n for _, n in widths] != inputs:
    return None
  fields = {
    'head': 'mlp' if len(layers) > 1 else 'linear',
    'head_layers': len(layers),
    'head_hidden': 0 if hidden <= {features} else hidden.pop(),
    'head_dim': widths[-1][0],
    'head_norm': norm,
  }
  notes: list[str] = []
  found: Tensors = {}
  index = 0
  for i, layer in enumerate(layers, 1):
    place = '' if len(layers) == 1 and norm == 'none' else f'{index}.'
    linear, bn, last = dict(layer.linear), dict(layer.norm), i == len(layers)
    bias = linear.pop('bias', np.zeros(len(linear['weight']), np.float32))
    if norm == 'none' or (norm == 'hidden' and last):
      linear['bias'] = bias
    elif bias.any():  # BatchNorm subtracts a bias again
      bn['running_mean'] = (bn['running_mean'].astype(np.float64) - bias).astype(np.float32)
      notes.append(
        f'the bias of layer {i} of the head was merged into the running mean of its BatchNorm'
      )
    if bn and norm == 'all' and last:
      bn.setdefault('bias', np.zeros(widths[-1][0], np.float32))
    found |= {f'{place}{leaf}': x for leaf, x in linear.items()}
    found |= {f'{index + 1}.{leaf}': x for leaf, x in bn.items()}
    index += 2 + bool(bn)
  names = torch_names.head(assemble.architecture({**model, **fields}), features)
  return fields, torch_names.from_torch(names, found, what), notes


def _norm(layers: list[Layer]) -> str | None:
  """The `head_norm` of a head; None if there is none such."""
  *hidden, last = layers
  affine = all({'weight', 'bias'} <= layer.norm.keys() for layer in hidden)
  if not any(layer.norm for layer in layers):
    return 'none'
  if not affine:
    return None
  if not last.norm:
    return 'hidden'
  if 'weight' not in last.norm:
    return None if 'bias' in last.norm else 'all_last_plain'
  return None if np.any(last.norm.get('bias', 0)) else 'all'
