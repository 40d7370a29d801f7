"""Writes `load_torch.py`, a short program that builds a network in PyTorch exactly and loads its weights.

It is needed where no class of torchvision computes the network: max-pooling or convolutions that pad as TensorFlow does,
projections in group 1 of ResNet-18 and 34, other widths and stems, and, from timm, selective kernels and squeeze and
excitation.
"""

from typing import Any

from simclr_jax.interop.model import Model
from simclr_jax.models import resnet

TORCHVISION = (18, 34, 50, 101, 152)  # depths that have a function, such as `resnet50`

HEAD = '''"""Builds the network and loads its weights: `model = load()`.

`model(x)`: images x [n, {channels}, h, w], float32 in [0, 1], minus mean {mean}, divided by {std}
-> {output} [n, d]. Needs {needs}.
"""
import pathlib
'''
SAME = """
def same(x, size, stride):  # pads as TensorFlow does: one pixel more at the end if the number is odd
  h, w = (max(size - (n % stride or stride), 0) for n in x.shape[2:])
  return F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2))
"""
POOL = """
class SamePool(nn.Module):
  def forward(self, x):  # after a ReLU, zeros do not change the maximum
    return F.max_pool2d(same(x, 3, 2), 3, 2)
"""
CONV = """
class SameConv(nn.Conv2d):
  def forward(self, x):
    return super().forward(same(x, self.kernel_size[0], self.stride[0]))
"""
SHORTCUT = """
class ShortcutPool(nn.AvgPool2d):
  def forward(self, x):  # for stride 1, the pixels beyond the edge do not count
    return super().forward(F.pad(x, (0, 1, 0, 1), 'replicate' if self.stride == 1 else 'constant'))
"""
WIDE = """
class Network(ResNet):
  def _make_layer(self, block, planes, *args, **kwargs):
    self.inplanes = {width} if planes == 64 else self.inplanes
    return super()._make_layer(block, planes * {width} // 64, *args, **kwargs)
"""


def obstacle(
  architecture: dict[str, Any], depths: tuple[int, ...] = TORCHVISION, wide: bool = False
) -> str:
  """Why no ResNet class of torchvision computes a network exactly; '' if one does.

  Args:
    architecture: see `config.architecture`.
    depths: the depths that the class has.
    wide: whether the class has other widths than 1.
  """
  a = architecture
  reasons = {
    f'an encoder of your own, {a["encoder"]}': a['encoder'],
    'selective kernels': a['sk_ratio'] > 0,
    'squeeze and excitation': a['se_ratio'] > 0,
    f'the {a["stem"]} stem': a['stem'] != 'imagenet',
    f'the variant {a["variant"]}, which pads like TensorFlow': a['variant'] != 'torchvision',
    f'depth {a["depth"]}': a['depth'] not in depths,
    f'width {a["width_multiplier"]:g}': a['width_multiplier'] != 1 and not wide,
    f'images of {a.get("channels", 3)} channels': a.get('channels', 3) != 3,
  }
  return next((reason for reason, holds in reasons.items() if holds), '')


def is_needed(model: Model) -> bool:
  """Whether the weights need `load_torch.py`."""
  return bool(obstacle(model.architecture) or (model.top and model.kept))


def needs(architecture: dict[str, Any]) -> str:
  """The packages that the program needs."""
  return 'torch and timm' if _uses_timm(architecture) else 'torch, torchvision and safetensors'


def _uses_timm(a):
  return a['sk_ratio'] > 0 or a['se_ratio'] > 0


def text(model: Model, mean: list[float], std: list[float]) -> str:
  """The program `load_torch.py`, which reads `model.safetensors` beside it.

  Args:
    model: a ResNet of this package.
    mean, std: of the channels.
  """
  a = model.architecture
  timm = _uses_timm(a)
  same_conv, same_pool = a['variant'] == 'haiku', a['variant'] != 'torchvision'
  pool = resnet.STEMS[a['stem']][2]
  width = int(64 * a['width_multiplier'])
  output = {'': 'features', 'projection': 'projection z', 'logits': 'logits'}[model.top]
  head = HEAD.format(
    channels=a.get('channels', 3), mean=mean, std=std, output=output, needs=needs(a)
  )
  classes = [
    SAME * (same_conv or (pool and same_pool)),
    POOL * (pool and same_pool),
    CONV * same_conv,
    SHORTCUT * (a['sk_ratio'] > 0),
    WIDE.format(width=width) * (not timm and width != 64),
  ]
  lines = [
    'def load(folder=pathlib.Path(__file__).parent):', *_network(a, timm, width), *_stem(a, width),
    *_blocks(a, width),
    f'model.fc = {_top(model)}',
    "model.load_state_dict(load_file(folder / 'model.safetensors'))",
    'return model.eval()',
  ]  # fmt: skip
  imports = _imports(a, timm, functional=any(classes[:-1]))
  return ''.join((head, imports, *classes, '\n' + '\n  '.join(lines) + '\n'))


def _imports(a, timm, functional):
  block = 'Bottleneck' if resnet.DEPTHS[a['depth']][1] else 'BasicBlock'
  lines = ['import torch.nn.functional as F'] * functional
  lines.append('from safetensors.torch import load_file')
  if timm:
    if a['se_ratio'] > 0:
      lines.append('from timm.layers import SEModule')
    if a['sk_ratio'] > 0:
      lines.append('from timm.layers.selective_kernel import SelectiveKernelAttn')
    lines.append(f'from timm.models.resnet import {block}, ResNet')
    if a['sk_ratio'] > 0:
      lines.append('from timm.models.sknet import SelectiveKernelBottleneck')
  lines.append('from torch import nn')
  if not timm:
    lines.append(f'from torchvision.models.resnet import {block}, ResNet')
  return '\n'.join(lines) + '\n'


def _network(a, timm, width):
  """Lines that build a network with the right blocks."""
  blocks, bottleneck = resnet.DEPTHS[a['depth']]
  layers = [*blocks, *[1] * (4 - len(blocks))]
  block = 'Bottleneck' if bottleneck else 'BasicBlock'
  if not timm:
    return [f'model = {"ResNet" if width == 64 else "Network"}({block}, {layers})']
  channels = tuple(width * 2**i for i in range(4))
  options = f"stem_type='deep', stem_width={width // 2}, avg_down={a['sk_ratio'] > 0}"
  if a['sk_ratio'] > 0 and bottleneck:
    block = 'SelectiveKernelBottleneck'
    options += ', block_args=dict(sk_kwargs=dict(kernel_size=[3, 3], split_input=False))'
  return [f'model = ResNet({block}, {layers}, channels={channels}, {options})']


def _stem(a, width):
  """Lines that replace the stem."""
  channels = a.get('channels', 3)
  size, stride, pool = resnet.STEMS[a['stem']]
  lines = []
  if a['sk_ratio'] == 0 or a['stem'] != 'imagenet':
    lines.append(
      f'model.conv1 = nn.Conv2d({channels}, {width}, {size}, {stride}, {size // 2}, bias=False)'
    )
    lines.append(f'model.bn1 = nn.BatchNorm2d({width})')
  elif channels != 3:
    lines.append(f'model.conv1[0] = nn.Conv2d({channels}, {width // 2}, 3, 2, 1, bias=False)')
  if not pool:
    lines.append('model.maxpool = nn.Identity()')
  elif a['variant'] != 'torchvision':
    lines.append('model.maxpool = SamePool()')
  return lines


def _blocks(a, width):
  """Lines that change the blocks."""
  blocks, bottleneck = resnet.DEPTHS[a['depth']]
  sk, se, lines = a['sk_ratio'], a['se_ratio'], []
  if len(blocks) < 4:
    lines.append('model.layer4 = nn.Identity()')
  if a['variant'] != 'torchvision' and not bottleneck:
    pool = 'nn.Identity(), ' * (sk > 0)
    conv = f'nn.Conv2d({width}, {width}, 1, bias=False), nn.BatchNorm2d({width})'
    lines.append(f'model.layer1[0].downsample = nn.Sequential({pool}{conv})')
  if sk > 0 or se > 0:
    lines.append(
      f'for i, layer in enumerate([model.layer1, model.layer2, model.layer3, model.layer4][:{len(blocks)}]):'
    )
  if sk > 0:
    lines.append('  if layer[0].downsample is not None:')
    lines.append('    layer[0].downsample[0] = ShortcutPool(2, 2 if i else 1)')
  if (sk > 0 and bottleneck) or se > 0:
    lines.append('  for block in layer:')
    lines.append(f'    f = {width} * 2**i')
  if sk > 0 and bottleneck:
    lines.append(f'    block.conv2.attn = SelectiveKernelAttn(f, 2, max(int(f * {sk}), 32))')
  if se > 0:
    lines.append(
      f'    block.se = SEModule({"4 * " * bottleneck}f, rd_channels=max(int(f * {se}), 1))'
    )
  if a['variant'] == 'haiku':
    lines.append('for m in list(model.modules()):')
    lines.append('  if isinstance(m, nn.Conv2d) and m.stride[0] > 1 and m.kernel_size[0] > 1:')
    lines.append('    m.__class__, m.padding = SameConv, (0, 0)')
  return lines


def _top(model):
  """The layers above the features, in the order of their tensors."""
  tensors = {name[3:]: x for name, x in model.tensors().items() if name.startswith('fc.')}
  if not tensors:
    return 'nn.Identity()'
  if 'weight' in tensors:
    return _linear(tensors, '')
  last = max(int(name.split('.')[0]) for name in tensors)
  layers = []
  for i in range(last + 1):
    mean = tensors.get(f'{i}.running_mean')
    if mean is not None:
      affine = '' if f'{i}.weight' in tensors else ', affine=False'
      layers.append(f'nn.BatchNorm1d({len(mean)}{affine})')
    else:
      layers.append(_linear(tensors, f'{i}.') if f'{i}.weight' in tensors else 'nn.ReLU()')
  return f'nn.Sequential({", ".join(layers)})'


def _linear(tensors, prefix):
  outputs, inputs = tensors[f'{prefix}weight'].shape
  bias = '' if f'{prefix}bias' in tensors else ', bias=False'
  return f'nn.Linear({inputs}, {outputs}{bias})'
