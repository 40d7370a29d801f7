"""Format ONNX: a graph that is written node by node, with the normalisation of the pixels inside.

Converters of JAX programs are not used: they drop explicit padding.
"""

import importlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from simclr_jax.errors import ConfigError
from simclr_jax.interop import torch_files
from simclr_jax.interop.model import Model, check_weights, normalization
from simclr_jax.models import resnet
from simclr_jax.runtime import files

READER = 'onnxruntime'
FILE = 'model.onnx'
OPSET, IR = 18, 8
LARGEST = 1_900_000_000  # bytes of weights in the file itself; protobuf allows 2 GiB
EPSILON = 1e-5  # of BatchNorm


def check(model: Model) -> None:
  """Raises ConfigError if the format has no names for the network, or a package is missing."""
  model.tensors()
  for package in ('onnx', 'onnxruntime'):
    try:
      importlib.import_module(package)
    except ImportError:
      raise ConfigError(
        f"--to=onnx needs {package}, which is not installed: pip install 'simclr_jax[onnx]'"
      ) from None


def needs(model: Model) -> str:
  """What loads the file, in one line."""
  return f'any runtime of ONNX opset {OPSET}; images are [n, {model.architecture.get("channels", 3)}, h, w] in [0, 1]'


def write(model: Model, folder: pathlib.Path) -> bool:
  """Writes the files of a network into a folder; returns whether the network takes images of any size."""
  import onnx

  content = _model(model)
  if sum(len(x.raw_data) for x in content.graph.initializer) > LARGEST:
    onnx.save_model(
      content, str(folder / FILE), save_as_external_data=True, location=f'{FILE}.data'
    )
    onnx.checker.check_model(str(folder / FILE))
    return True
  onnx.checker.check_model(content, full_check=True)
  with files.atomic(folder / FILE) as file:
    file.write(content.SerializeToString())
  return True


def read(model: Model, folder: pathlib.Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
  """A function from images `[n, h, w, c]` in [0, 1] to the outputs, computed from the files by another library."""
  import onnx
  import onnxruntime

  stored = onnx.load(str(folder / FILE)).graph.initializer
  check_weights(
    {x.name: onnx.numpy_helper.to_array(x) for x in stored},
    {x.name: onnx.numpy_helper.to_array(x) for x in _model(model).graph.initializer},
  )
  session = onnxruntime.InferenceSession(str(folder / FILE), providers=['CPUExecutionProvider'])
  names = [output.name for output in session.get_outputs()]

  def run(x):
    return dict(zip(names, session.run(names, {'images': x.transpose(0, 3, 1, 2)})))

  return run


def usage(model: Model) -> str:
  """A program in Python that loads the files."""
  return (
    f"import onnxruntime\n\nsession = onnxruntime.InferenceSession('{FILE}')\n"
    "outputs = session.run(None, {'images': images})  # float32 [n, channels, height, width] in [0, 1]\n"
  )


def limits(model: Model) -> list[str]:
  """Sentences about what goes wrong without an error."""
  return ['The mean and the standard deviation are inside the graph: do not normalise the images.']


class _Graph:
  """The nodes of a graph. Methods add a layer to the value `x`, the name of an output, and return that of the result.

  Attributes:
    nodes, initializers: of the graph.
    tensors: of the network, with the names of torchvision.
  """

  def __init__(self, tensors: dict[str, np.ndarray], same_conv: bool):
    """`same_conv`: whether convolutions pad as TensorFlow does."""
    self.nodes: list[Any] = []
    self.initializers: list[Any] = []
    self.tensors, self._same_conv = tensors, same_conv

  def op(self, kind: str, inputs: list[str], outputs: int = 1, **attributes: Any) -> Any:
    """A node; its output, or a list of several."""
    from onnx import helper

    names = [f'{kind}_{len(self.nodes)}_{i}' for i in range(outputs)]
    self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
    return names[0] if outputs == 1 else names

  def constant(self, name: str, x: np.ndarray) -> str:
    """An array of the file."""
    from onnx import numpy_helper

    self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(x, np.float32), name))
    return name

  def tensor(self, name: str) -> str:
    """A tensor of the network."""
    return self.constant(name, self.tensors[name])

  def has(self, name: str) -> bool:
    """Whether the network has a tensor."""
    return name in self.tensors

  def conv(self, x: str, name: str, stride: int = 1) -> str:
    """A convolution."""
    size = self.tensors[f'{name}.weight'].shape[-1]
    padding: dict[str, Any] = {'pads': [size // 2] * 4}
    if self._same_conv and size > 1:
      padding = {'auto_pad': 'SAME_UPPER'}
    bias = [self.tensor(f'{name}.bias')] if self.has(f'{name}.bias') else []
    return self.op(
      'Conv', [x, self.tensor(f'{name}.weight'), *bias],
      kernel_shape=[size, size], strides=[stride, stride], **padding,
    )  # fmt: skip

  def norm(self, x: str, name: str) -> str:
    """BatchNorm with the running averages."""
    mean = self.tensors[f'{name}.running_mean']
    defaults = {'weight': np.ones_like(mean), 'bias': np.zeros_like(mean)}
    values = {f'{name}.{leaf}': x for leaf, x in defaults.items()} | self.tensors
    leaves = [
      self.constant(f'{name}.{leaf}', values[f'{name}.{leaf}'])
      for leaf in ('weight', 'bias', 'running_mean', 'running_var')
    ]
    return self.op('BatchNormalization', [x, *leaves], epsilon=EPSILON)

  def conv_norm(self, x: str, conv: str, norm: str, stride: int = 1) -> str:
    """A convolution and BatchNorm."""
    return self.norm(self.conv(x, conv, stride), norm)

  def relu(self, x: str) -> str:
    """max(x, 0)."""
    return self.op('Relu', [x])

  def linear(self, x: str, name: str) -> str:
    """A matrix product."""
    bias = [self.tensor(f'{name}.bias')] if self.has(f'{name}.bias') else []
    return self.op('Gemm', [x, self.tensor(f'{name}.weight'), *bias], transB=1)


def _model(model: Model) -> Any:
  """The file as a `ModelProto`."""
  from onnx import TensorProto, helper

  tensors, a = model.tensors(), model.architecture
  graph = _Graph(tensors, a['variant'] == 'haiku')
  h = _features(graph, a)
  outputs = {'features': h} | ({model.top: _top(graph, h)} if model.top else {})
  for name, value in outputs.items():
    graph.nodes.append(helper.make_node('Identity', [value], [name]))
  images = ['batch', a.get('channels', 3), 'height', 'width']
  content = helper.make_graph(
    graph.nodes,
    'simclr_jax',
    [helper.make_tensor_value_info('images', TensorProto.FLOAT, images)],
    [helper.make_tensor_value_info(name, TensorProto.FLOAT, ['batch', None]) for name in outputs],
    graph.initializers,
  )
  result = helper.make_model(content, opset_imports=[helper.make_opsetid('', OPSET)])
  result.ir_version, result.producer_name = IR, 'simclr_jax'
  helper.set_model_props(result, {'simclr_jax': json.dumps(torch_files.about(model))})
  return result


def _features(graph, a):
  """The output of global average pooling, `[n, d]`."""
  mean, std = normalization(a)
  x = 'images'
  if a['normalize'] != 'none':
    x = graph.op('Sub', [x, graph.constant('mean', np.reshape(mean, (1, -1, 1, 1)))])
    x = graph.op('Div', [x, graph.constant('std', np.reshape(std, (1, -1, 1, 1)))])
  _, stride, pool = resnet.STEMS[a['stem']]
  if graph.has('conv1.0.weight'):  # three convolutions
    x = graph.relu(graph.conv_norm(x, 'conv1.0', 'conv1.1', stride))
    x = graph.relu(graph.conv_norm(x, 'conv1.3', 'conv1.4'))
    x = graph.conv(x, 'conv1.6')
  else:
    x = graph.conv(x, 'conv1', stride)
  x = graph.relu(graph.norm(x, 'bn1'))
  if pool:
    padding = {'pads': [1] * 4} if a['variant'] == 'torchvision' else {'auto_pad': 'SAME_UPPER'}
    x = graph.op('MaxPool', [x], kernel_shape=[3, 3], strides=[2, 2], **padding)
  for i, count in enumerate(resnet.DEPTHS[a['depth']][0], 1):
    for block in range(count):
      x = _block(graph, x, f'layer{i}.{block}', 2 if i > 1 and not block else 1)
  return graph.op('Flatten', [graph.op('GlobalAveragePool', [x])])


def _block(graph, x, name, stride):
  """A residual block."""
  y = x
  if graph.has(f'{name}.conv2.paths.0.conv.weight'):
    y = graph.relu(graph.conv_norm(y, f'{name}.conv1.conv', f'{name}.conv1.bn'))
    y = _selective(graph, y, f'{name}.conv2', stride)
    y = graph.conv_norm(y, f'{name}.conv3.conv', f'{name}.conv3.bn')
  else:
    layers = 3 if graph.has(f'{name}.conv3.weight') else 2
    for i in range(1, layers + 1):
      strided = i == layers - 1  # the 3x3 convolution of a bottleneck, the first one otherwise
      y = graph.conv_norm(y, f'{name}.conv{i}', f'{name}.bn{i}', stride if strided else 1)
      y = y if i == layers else graph.relu(y)
  if graph.has(f'{name}.se.fc1.weight'):
    mean = graph.relu(graph.conv(graph.op('GlobalAveragePool', [y]), f'{name}.se.fc1'))
    y = graph.op('Mul', [y, graph.op('Sigmoid', [graph.conv(mean, f'{name}.se.fc2')])])
  return graph.relu(graph.op('Add', [y, _shortcut(graph, x, f'{name}.downsample', stride)]))


def _selective(graph, x, name, stride):
  """Selective kernels: the softmax of two streams is a sigmoid of the difference."""
  streams = [
    graph.relu(graph.conv_norm(x, f'{name}.paths.{i}.conv', f'{name}.paths.{i}.bn', stride))
    for i in (0, 1)
  ]
  mean = graph.op('GlobalAveragePool', [graph.op('Add', streams)])
  mean = graph.relu(graph.conv_norm(mean, f'{name}.attn.fc_reduce', f'{name}.attn.bn'))
  parts = graph.op('Split', [graph.conv(mean, f'{name}.attn.fc_select')], 2, axis=1, num_outputs=2)
  weighted = [
    graph.op('Mul', [stream, graph.op('Sigmoid', [graph.op('Sub', order)])])
    for stream, order in zip(streams, (parts, parts[::-1]))
  ]
  return graph.op('Add', weighted)


def _shortcut(graph, x, name, stride):
  """The identity or a projection."""
  if graph.has(f'{name}.2.weight'):  # average pooling, a convolution, BatchNorm
    x = graph.op(
      'AveragePool', [x], kernel_shape=[2, 2], strides=[stride] * 2, pads=[0, 0, 1, 1],
      count_include_pad=int(stride > 1),
    )  # fmt: skip
    return graph.conv_norm(x, f'{name}.1', f'{name}.2')
  if graph.has(f'{name}.0.weight'):
    return graph.conv_norm(x, f'{name}.0', f'{name}.1', stride)
  return x


def _top(graph, x):
  """The layers `fc.*`: a linear layer, or a sequence with ReLU where an index is left out."""
  if graph.has('fc.weight'):
    return graph.linear(x, 'fc')
  places = {int(name.split('.')[1]) for name in graph.tensors if name.startswith('fc.')}
  for i in range(max(places) + 1):
    if graph.has(f'fc.{i}.running_mean'):
      x = graph.norm(x, f'fc.{i}')
    else:
      x = graph.linear(x, f'fc.{i}') if i in places else graph.relu(x)
  return x
