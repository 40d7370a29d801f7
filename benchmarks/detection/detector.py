"""Faster R-CNN of torchvision on a pretrained ResNet: R50-C4, as in MoCo, or FPN."""

import functools
import json
import pathlib
import zlib
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import MultiScaleRoIAlign, roi_align
from voc import Problem

DEPTHS = {
  18: (BasicBlock, [2, 2, 2, 2]), 34: (BasicBlock, [3, 4, 6, 3]), 50: (Bottleneck, [3, 4, 6, 3]),
  101: (Bottleneck, [3, 4, 23, 3]), 152: (Bottleneck, [3, 8, 36, 3]), 200: (Bottleneck, [3, 24, 36, 3]),
}  # fmt: skip
VARIANTS = ('torchvision', 'simclr')
NORMALIZE = {
  'imagenet': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  'none': ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
FILE = 'model.safetensors'


class Weights(NamedTuple):
  """A pretrained ResNet.

  Attributes:
    tensors: by torchvision's names, without the classifier; empty: random weights.
    depth: a key of `DEPTHS`.
    variant: one of `VARIANTS`.
    mean, std: of the pixels in [0, 1].
    checksum: CRC-32 of the tensors.
  """

  tensors: dict[str, torch.Tensor]
  depth: int
  variant: str
  mean: list[float]
  std: list[float]
  checksum: int


class SamePool(nn.Module):
  """3x3 max-pooling with stride 2 that pads as TensorFlow does; after a ReLU, zeros do not change the maximum."""

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    h, w = x.shape[2:]
    return F.max_pool2d(F.pad(x, (w % 2, 1, h % 2, 1)), 3, 2)


class AlignedPool(MultiScaleRoIAlign):
  """RoIAlign on the map of stride 16, aligned and with as many samples as detectron2 takes."""

  def forward(self, x: dict[str, torch.Tensor], boxes: Any, image_shapes: Any) -> torch.Tensor:
    return roi_align(x['0'], boxes, self.output_size, 1 / 16, sampling_ratio=0, aligned=True)


class Res5(nn.Sequential):
  """The head of C4: features of a region [n, c, 14, 14] -> layer4, one more BatchNorm, mean: [n, d]."""

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return super().forward(x).mean(dim=(2, 3))


def resnet(depth: int, variant: str) -> ResNet:
  """A ResNet of torchvision without its classifier; `variant`: 'torchvision', or 'simclr', as google-research/simclr."""
  block, layers = DEPTHS[depth]
  net = ResNet(block, layers)
  net.fc = nn.Identity()
  if variant == 'simclr':
    net.maxpool = SamePool()
    if block is BasicBlock:  # a projection also where the shape does not change
      net.layer1[0].downsample = nn.Sequential(nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64))
  return net


def body(net: ResNet) -> nn.Sequential:
  """Images -> the map of stride 16: all before layer4."""
  names = ('conv1', 'bn1', 'relu', 'maxpool', 'layer1', 'layer2', 'layer3')
  layers = nn.Sequential(OrderedDict((name, getattr(net, name)) for name in names))
  layers.out_channels = width(net.layer3)
  return layers


def width(layer: nn.Sequential) -> int:
  """Number of output channels of a layer of a ResNet."""
  last = layer[-1]
  return (last.bn3 if isinstance(last, Bottleneck) else last.bn2).num_features


def build(
  kind: str,
  weights: Weights,
  classes: int,
  train_sizes: list[int],
  test_size: int,
  longest: int,
  regions: int,
) -> FasterRCNN:
  """Faster R-CNN in which nothing is frozen.

  Args:
    kind: 'c4' or 'fpn'.
    weights: of the ResNet.
    classes: number of classes, without the background.
    train_sizes: short sides of training images in pixels, of which one is drawn for each image.
    test_size: short side of test images.
    longest: limit of the long side.
    regions: number of regions of a training image in which the classifier is trained.
  """
  net = resnet(weights.depth, weights.variant)
  if weights.tensors:
    net.load_state_dict(weights.tensors)
  options = {
    'image_mean': weights.mean, 'image_std': weights.std, 'max_size': longest,
    'box_batch_size_per_image': regions,
  }  # fmt: skip
  detector = (c4 if kind == 'c4' else fpn)(net, classes, options)
  # torchvision draws one of all sizes for training, and tests at the last one.
  detector.transform.min_size = (*train_sizes, test_size)
  detector.transform.torch_choice = lambda sizes: sizes[int(torch.randint(len(sizes) - 1, ()))]
  return detector


def c4(net: ResNet, classes: int, options: dict[str, Any]) -> FasterRCNN:
  """The features of a region are computed by layer4; the sizes are those of detectron2's R50-C4."""
  d = width(net.layer4)
  predictor = FastRCNNPredictor(d, classes + 1)
  for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
  return FasterRCNN(
    body(net),
    rpn_anchor_generator=AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),)),
    box_roi_pool=AlignedPool(['0'], 14, 0),
    box_head=Res5(net.layer4, nn.BatchNorm2d(d)),
    box_predictor=predictor,
    rpn_pre_nms_top_n_train=12000,
    rpn_pre_nms_top_n_test=6000,
    size_divisible=1,
    **options,
  )


def fpn(net: ResNet, classes: int, options: dict[str, Any]) -> FasterRCNN:
  """The usual feature pyramid of torchvision, with BatchNorm."""
  layers = {f'layer{i}': str(i - 1) for i in range(1, 5)}
  channels = [width(getattr(net, name)) for name in layers]
  backbone = BackboneWithFPN(net, layers, channels, 256, norm_layer=nn.BatchNorm2d)
  return FasterRCNN(backbone, classes + 1, **options)


# Weights.


def load(source: str, depth: int, variant: str, normalize: str) -> Weights:
  """The weights of a ResNet.

  Args:
    source: 'random', a file of torchvision's names (.safetensors, or of `torch.save`), or a folder with a
      `model.safetensors`, as `simclr-jax export --to=safetensors` or `--to=timm` writes it.
    depth: of random weights.
    variant, normalize: '', or what a file does not say: one of `VARIANTS`, a key of `NORMALIZE`.

  Raises:
    Problem: the file is damaged, or its network is no ResNet that torchvision computes.
  """
  if source == 'random':
    mean, std = NORMALIZE[normalize or 'imagenet']
    return Weights({}, depth, variant or 'torchvision', list(mean), list(std), 0)
  path = pathlib.Path(source)
  if path.is_dir() and (path / 'encoder.json').exists():
    raise Problem(f'{path} is an export for simclr-jax: write one for PyTorch by simclr-jax export --workdir={path} --to=safetensors')  # fmt: skip
  path = path / FILE if path.is_dir() else path
  if not path.is_file():
    raise Problem(f'{path} is missing')
  tensors, about = _read(path)
  tensors = {name: x for name, x in tensors.items() if not name.startswith('fc.')}
  a = about.get('architecture', {})
  depth = _depth(path, tensors, a)
  own = a.get('variant') or ('simclr' if depth < 50 and 'layer1.0.downsample.0.weight' in tensors else '')  # fmt: skip
  if own and variant and own != variant:
    raise Problem(f'{path} has the variant {own}: leave out --variant')
  variant = own or variant or 'torchvision'
  mean, std = _normalization(path, about, normalize)
  _check(path, tensors, resnet(depth, variant))
  checksum = functools.reduce(
    lambda crc, x: zlib.crc32(x.contiguous().numpy().tobytes(), crc), tensors.values(), 0
  )
  return Weights(tensors, depth, variant, mean, std, checksum)


def _read(path):
  """The tensors of a file, and what our export says about them."""
  try:
    if path.suffix != '.safetensors':
      tensors = torch.load(path, map_location='cpu', weights_only=True)
      if not (isinstance(tensors, dict) and all(torch.is_tensor(x) for x in tensors.values())):
        raise ValueError('it is no dict of tensors')
      return tensors, {}
    from safetensors import safe_open

    with safe_open(path, 'pt') as file:
      about = json.loads((file.metadata() or {}).get('simclr_jax', '{}'))
      return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
  except ImportError:
    raise Problem(f'{path} needs the package safetensors: pip install safetensors') from None
  except Exception as error:  # the readers raise many types
    first = str(error).strip().split('\n')[0][:200]
    raise Problem(
      f'{path} is damaged or no file of a ResNet in the names of torchvision, which simclr-jax import and simclr-jax '
      f'export --to=safetensors write: {first}'
    ) from None


def _depth(path, tensors, architecture):
  """The depth of a ResNet; raises Problem if torchvision's class does not compute it."""
  first = tensors.get('conv1.weight')
  blocks = [len({n.split('.')[1] for n in tensors if n.startswith(f'layer{i}.')}) for i in range(1, 5)]  # fmt: skip
  block = Bottleneck if 'layer1.0.conv3.weight' in tensors else BasicBlock
  depth = next((d for d, network in DEPTHS.items() if network == (block, blocks)), 0)
  reasons = {
    "selective kernels or a stem of three convolutions": 'conv1.0.weight' in tensors,
    'squeeze and excitation': any('.se.' in name for name in tensors),
    f'the variant {architecture.get("variant")}': architecture.get('variant', 'simclr') not in VARIANTS,
    'names that are not those of torchvision': first is None or 'bn1.weight' not in tensors,
    'another stem than 7x7 on three channels': first is not None and first.shape[1:] != (3, 7, 7),
    'another width than 1': first is not None and first.shape[0] != 64,
    f'{blocks} blocks': not depth,
  }  # fmt: skip
  for reason, holds in reasons.items():
    if holds:
      raise Problem(
        f"{path} is no network that torchvision's ResNet computes, because of {reason}: use a ResNet of depth "
        f'{", ".join(map(str, DEPTHS))} and width 1 without selective kernels'
      )
  return depth


def _normalization(path, about, normalize):
  """Mean and standard deviation that belong to a file."""
  own = about.get('preprocessing')
  config = path.with_name('config.json')
  try:
    if not own and path.suffix == '.safetensors' and config.is_file():
      own = json.loads(config.read_text()).get('pretrained_cfg')
    if own:
      mean, std = ([float(x) for x in own[name]] for name in ('mean', 'std'))
      if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError
  except (ValueError, TypeError, KeyError, AttributeError, OSError):
    raise Problem(f'{config if config.is_file() else path} has no mean and std of three channels') from None  # fmt: skip
  if own and normalize and (tuple(mean), tuple(std)) != NORMALIZE[normalize]:
    raise Problem(f'{path} was trained with mean {mean} and std {std}: leave out --normalize')
  if own:
    return mean, std
  if not normalize:
    raise Problem(
      f'{path} does not say how the images were normalised: add --normalize=imagenet (torchvision, MoCo) or none '
      '(SimCLR)'
    )
  return tuple(map(list, NORMALIZE[normalize]))


def _check(path, tensors, net):
  """Raises Problem unless the tensors are exactly those of a network, and finite."""
  wanted = {name: x for name, x in net.state_dict().items() if 'num_batches' not in name}
  found = {name: x for name, x in tensors.items() if 'num_batches' not in name}
  shapes = [n for n in wanted if n in found and found[n].shape != wanted[n].shape]
  broken = [n for n, x in found.items() if x.is_floating_point() and not x.isfinite().all()]
  problems = {
    'lacks': wanted.keys() - found.keys(), 'also has': found.keys() - wanted.keys(),
    'has another shape of': shapes, 'has values that are not finite in': broken,
  }  # fmt: skip
  for problem, names in problems.items():
    if names:
      more = f' and {len(names) - 4} more' if len(names) > 4 else ''
      raise Problem(f'{path} {problem} {", ".join(sorted(names)[:4])}{more}')
