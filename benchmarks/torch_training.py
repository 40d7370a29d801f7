"""SimCLR and MoCo on CIFAR-10 in plain PyTorch: the other side of against_torch.py.

Written from the papers and from descriptions of the released programs: Chen et al. 2020a (SimCLR), You et al. 2017 (LARS),
He et al. 2020 (MoCo) with its CIFAR-10 demo, He et al. 2016 (ResNet). Uses nothing of simclr_jax. The settings are those of
the recipes simclr_cifar10 and moco_cifar10, the network is a ResNet-8 with 16, 32 and 64 channels and a strided stem.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import transforms

DIM = 128  # of the output z of the projection head


class Training:
  """A training; `step(i)` runs step i and returns its loss.

  Attributes:
    features_of: what the kNN classifier of the method gets, 'h' or 'z'.
  """

  features_of = 'h'

  def __init__(self, images: np.ndarray, seed: int, batch: int, epochs: int, rate: float):
    """Creates the networks.

    Args:
      images: uint8 `[n, 32, 32, 3]`.
      seed: of weights, order and augmentations.
      batch: images per step.
      epochs: the length of the schedule.
      rate: the learning rate; SimCLR: per 256 images.
    """
    torch.manual_seed(seed)
    self.images, self.batch, self.epochs = images, batch, epochs
    self.steps = len(images) * epochs // batch + 1
    self.rng = np.random.default_rng(seed)
    # A batch may span two epochs, the last one continues in an epoch after the end.
    self.order = np.concatenate([self.rng.permutation(len(images)) for _ in range(epochs + 1)])
    self.augments = True
    self.build(rate)

  def build(self, rate: float) -> None:
    """Creates networks and optimizer."""
    raise NotImplementedError

  def rate(self, step: int) -> float:
    """The factor on the learning rate in a step."""
    raise NotImplementedError

  def view(self, rows: np.ndarray) -> torch.Tensor:
    """A random view of each image: float32 `[n, 3, 32, 32]` in [0, 1]."""
    raise NotImplementedError

  def loss(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss that is logged, and the loss that is minimised, for two views of the images."""
    raise NotImplementedError

  def step(self, i: int) -> float:
    rows = self.order[i * self.batch : (i + 1) * self.batch]
    draw = self.view if self.augments else lambda rows: pixels(self.images[rows])
    logged, minimised = self.loss(draw(rows), draw(rows))
    for group in self.optimizer.param_groups:
      group['lr'] = group['initial_lr'] * self.rate(i)
    self.optimizer.zero_grad()
    minimised.backward()
    self.optimizer.step()
    return logged.item()

  @torch.no_grad()
  def features(self, images: np.ndarray) -> np.ndarray:
    """Features of images without augmentation, BatchNorm with running averages: float32 `[n, d]`."""
    net = self.encoder if self.features_of == 'h' else nn.Sequential(self.encoder, self.head)
    net.eval()
    features = torch.cat([net(pixels(x)) for x in np.array_split(images, -(-len(images) // 500))])
    net.train()
    return features.numpy()

  def parameters(self) -> list[nn.Parameter]:
    """The parameters that are trained."""
    both = nn.ModuleList([self.encoder, self.head])
    return [p for p in both.parameters() if p.requires_grad]


class SimCLR(Training):
  """NT-Xent, LARS, linear warm-up in 1 % of the epochs and cosine decay, BatchNorm over both views of the batch."""

  temperature, weight_decay = 0.5, 1e-6

  def build(self, rate):
    self.encoder = resnet8(nn.BatchNorm2d, project_always=True)
    hidden, out = nn.Linear(64, 64, bias=False), nn.Linear(64, DIM, bias=False)
    self.head = nn.Sequential(hidden, nn.BatchNorm1d(64), nn.ReLU(), out, nn.BatchNorm1d(DIM))
    self.head[-1].bias.requires_grad_(False)  # the last BatchNorm has no offset
    for module in self.encoder.modules():
      if isinstance(module, nn.Conv2d):  # fan-in, truncated at two standard deviations, gain 1
        std = module.weight[0].numel() ** -0.5 / 0.87962566
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
      if isinstance(module, Block):
        nn.init.zeros_(module.body[-1].weight)
    nn.init.normal_(hidden.weight, std=0.01)
    nn.init.normal_(out.weight, std=0.01)
    self.optimizer = LARS(self.parameters(), rate * self.batch / 256, self.weight_decay)

  def rate(self, step):
    warmup = int(0.01 * self.epochs * len(self.images) / self.batch)
    if step < warmup:
      return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (self.steps - warmup)))

  def view(self, rows):
    crops = []
    for image in pixels(self.images[rows]):
      top, left, height, width = crop_box(self.rng, 32)
      crop = image[None, :, top : top + height, left : left + width]
      # Enlarging with antialias=True is Keys' bicubic kernel with a = -0.5, without it a = -0.75.
      crops.append(F.interpolate(crop, (32, 32), mode='bicubic', antialias=True))
    x = torch.cat(crops)
    x = torch.where(chosen(x, 0.5), x.flip(3), x)
    x = torch.where(chosen(x, 0.8), color_jitter(x, 0.5), x)
    gray = (x * torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    return torch.where(chosen(x, 0.2), gray, x).clamp(0, 1)

  def loss(self, first, second):
    z = F.normalize(self.head(self.encoder(torch.cat([first, second]))))
    similarity = (z @ z.T / self.temperature).fill_diagonal_(-math.inf)
    n = len(first)
    positive = torch.arange(2 * n).roll(n)
    mean = F.cross_entropy(similarity, positive)
    return mean, 2 * mean  # the released code adds the losses of the two directions


class MoCo(Training):
  """InfoNCE against a queue, SGD, cosine decay by epoch that ends at 0, BatchNorm in 8 groups with shuffled keys."""

  features_of = 'z'
  temperature, weight_decay, keys, ema, groups = 0.1, 5e-4, 4096, 0.99, 8

  def build(self, rate):
    def build_network():
      encoder = resnet8(lambda c: GroupedBatchNorm(c, self.groups), project_always=False)
      return nn.Sequential(Normalize(), *encoder), nn.Linear(64, DIM)

    self.encoder, self.head = build_network()
    for module in self.encoder.modules():
      if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
    self.query, self.key = (
      nn.Sequential(self.encoder, self.head),
      nn.Sequential(*build_network()).requires_grad_(False),
    )
    self.key.load_state_dict(self.query.state_dict())
    self.queue, self.oldest = F.normalize(torch.randn(self.keys, DIM)), 0
    self.optimizer = torch.optim.SGD(
      self.parameters(), rate, momentum=0.9, weight_decay=self.weight_decay
    )
    self.optimizer.param_groups[0]['initial_lr'] = rate
    self.pil = [transforms.functional.to_pil_image(image) for image in self.images]
    self.augment = transforms.Compose([
      transforms.RandomResizedCrop(32),
      transforms.RandomHorizontalFlip(),
      transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
      transforms.RandomGrayscale(0.2),
      transforms.ToTensor(),
    ])  # fmt: skip

  def rate(self, step):
    epoch = 1 + step * self.batch // len(self.images)  # counted from 1
    return 0.5 * (1 + math.cos(math.pi * min(epoch / self.epochs, 1)))

  def view(self, rows):
    return torch.stack([self.augment(self.pil[i]) for i in rows])

  def loss(self, first, second):
    q = F.normalize(self.query(first))
    with torch.no_grad():
      for theta_k, theta_q in zip(self.key.parameters(), self.query.parameters()):
        theta_k.mul_(self.ema).add_(theta_q, alpha=1 - self.ema)
      shuffled = torch.randperm(len(second))
      k = torch.empty_like(q)
      k[shuffled] = F.normalize(self.key(second[shuffled]))
    positive, negative = (q * k).sum(1, keepdim=True), q @ self.queue.T
    logits = torch.cat([positive, negative], 1) / self.temperature
    loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))
    self.queue = self.queue.clone()  # the backward pass needs the old one
    self.queue[self.oldest : self.oldest + len(k)] = k
    self.oldest = (self.oldest + len(k)) % self.keys
    return loss, loss


METHODS = {'simclr': SimCLR, 'moco': MoCo}


# Networks.


class Block(nn.Module):
  """Two 3x3 convolutions, and a shortcut that is the identity or a 1x1 convolution."""

  def __init__(self, inputs, outputs, stride, norm, project):
    super().__init__()
    first, second = conv(inputs, outputs, 3, stride), conv(outputs, outputs, 3, 1)
    self.body = nn.Sequential(first, norm(outputs), nn.ReLU(), second, norm(outputs))
    self.shortcut = nn.Identity()
    if project:
      self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), norm(outputs))

  def forward(self, x):
    return F.relu(self.body(x) + self.shortcut(x))


class GroupedBatchNorm(nn.BatchNorm2d):
  """BatchNorm of each of `groups` parts of the batch, as on as many GPUs: part i has the rows i, i + groups, ..."""

  def __init__(self, channels, groups):
    super().__init__(channels)
    self.groups = groups

  def forward(self, x):
    if not self.training:
      return super().forward(x)
    g = self.groups
    mean, var = torch.zeros(g * self.num_features), torch.ones(g * self.num_features)
    folded = x.unflatten(0, (-1, g)).flatten(1, 2)  # the channels of all groups side by side
    gamma, beta = self.weight.repeat(g), self.bias.repeat(g)
    # A momentum of 1 leaves the statistics of this batch in `mean` and `var`.
    y = F.batch_norm(folded, mean, var, gamma, beta, training=True, momentum=1.0, eps=self.eps)
    self.running_mean.lerp_(mean.view(g, -1).mean(0), self.momentum)
    self.running_var.lerp_(var.view(g, -1).mean(0), self.momentum)
    return y.view_as(x)


class Normalize(nn.Module):
  """Pixels minus the mean of CIFAR-10, over its standard deviation."""

  def forward(self, x):
    mean, std = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]]).view(2, 3, 1, 1)
    return (x - mean) / std


def conv(inputs, outputs, size, stride):
  """A convolution without bias, padded on all sides."""
  return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


def resnet8(norm, project_always: bool) -> nn.Sequential:
  """Stem, three blocks and average pooling: images `[n, 3, 32, 32]` -> h `[n, 64]`."""
  layers = [conv(3, 16, 3, 2), norm(16), nn.ReLU()]
  for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
    layers.append(Block(inputs, outputs, stride, norm, project_always or inputs != outputs))
  return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


# The optimizer.


class LARS(torch.optim.Optimizer):
  """SGD with momentum and the layer-wise rate 0.001 |w| / |g|; vectors have neither this nor weight decay."""

  def __init__(self, params, rate, weight_decay):
    super().__init__(params, {'lr': rate, 'initial_lr': rate})
    self.weight_decay = weight_decay

  @torch.no_grad()
  def step(self):
    for group in self.param_groups:
      for w in group['params']:
        g, rate = w.grad, group['lr']
        if w.ndim > 1:
          g = g + self.weight_decay * w
          if w.norm() > 0 and g.norm() > 0:
            rate = rate * 0.001 * w.norm() / g.norm()
        velocity = self.state[w].setdefault('velocity', torch.zeros_like(w))
        velocity.mul_(0.9).add_(rate * g)
        w.sub_(velocity)


# SimCLR's augmentations, those of TensorFlow: torchvision's crops and colours are others.


def pixels(images: np.ndarray) -> torch.Tensor:
  """Images uint8 `[n, 32, 32, 3]` -> float32 `[n, 3, 32, 32]` in [0, 1]."""
  return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() / 255


def chosen(x: torch.Tensor, p: float) -> torch.Tensor:
  """Whether an op is applied to an image, with probability p: bool `[n, 1, 1, 1]`."""
  return torch.rand(len(x), 1, 1, 1) < p


def crop_box(rng: np.random.Generator, side: int) -> tuple[int, int, int, int]:
  """Top, left, height and width of tf.image.sample_distorted_bounding_box: area 0.08 to 1, at least 10 % covered.

  Aspect ratio and height are uniform; a crop touches the bottom or the right edge only if it fills this side.
  """
  for _ in range(100):
    aspect = rng.uniform(3 / 4, 4 / 3)
    low, high = (round(side * math.sqrt(area / aspect)) for area in (0.08, 1))
    high = min(high, side, int((side + 0.5) / aspect))
    height = int(rng.integers(low, high, endpoint=True))
    height += height * round(height * aspect) < 0.08 * side**2  # rounding made the area too small
    width = round(height * aspect)
    if width <= side and 0.1 * side**2 <= height * width <= side**2:
      top, left = (int(rng.integers(max(side - length, 1))) for length in (height, width))
      return top, left, height, width
  return 0, 0, side, side


def color_jitter(x: torch.Tensor, strength: float) -> torch.Tensor:
  """Brightness (additive), contrast, saturation and hue in an order of its own for each image, clipped after each."""
  s = 0.8 * strength
  ranges = ((-s, s), (1 - s, 1 + s), (1 - s, 1 + s), (-s / 4, s / 4))
  amounts = [torch.empty(len(x), 1, 1, 1).uniform_(*r) for r in ranges]
  order, x = torch.rand(len(x), 4).argsort(1), x.clone()
  for place in range(4):
    for i, op in enumerate((torch.add, contrast, saturation, hue)):
      rows = order[:, place] == i
      x[rows] = op(x[rows], amounts[i][rows]).clamp(0, 1)
  return x


def contrast(x, factor):
  mean = x.mean((2, 3), keepdim=True)
  return mean + factor * (x - mean)


def saturation(x, factor):
  """Multiplies the saturation of HSV, at most to 1; value and hue stay."""
  value = x.amax(1, keepdim=True)
  chroma = (value - x.amin(1, keepdim=True)).clamp_min(1e-8)
  return value - torch.minimum(factor, value / chroma) * (value - x)


def hue(x, turns):
  """Shifts the hue of HSV by a number of turns; value and saturation stay."""
  low, chroma = x.amin(1), (x.amax(1) - x.amin(1)).clamp_min(1e-8)
  r, g, b = x.unbind(1)
  sixths = torch.where(
    r >= torch.maximum(g, b), (g - b) / chroma,
    torch.where(g >= b, 2 + (b - r) / chroma, 4 + (r - g) / chroma),
  )  # fmt: skip
  sixths = (sixths + 6 * turns[:, 0]) % 6
  colors = ((sixths - 3).abs() - 1, 2 - (sixths - 2).abs(), 2 - (sixths - 4).abs())
  return torch.stack([low + chroma * c.clamp(0, 1) for c in colors], 1)
