"""One SimCLR training step on the CPU: this project against PyTorch, in one run.

Both have the same network (ResNet, CIFAR stem, 2-layer head), batch, loss and SGD with momentum, and no augmentation;
PyTorch uses the channels-last layout. Prints seconds per step and the ratio. The two run alternately, so that a
busy machine slows both.

    python benchmarks/cpu_step.py [--depth 8] [--width 0.5] [--batch 256] [--rounds 8]
"""

import argparse
import time

import jax
import numpy as np
import optax

from simclr_jax import losses
from simclr_jax.models.mlp import MLP
from simclr_jax.models.resnet import DEPTHS, ResNet


def jax_step(depth, width, images, temperature=0.2):
  """A function that runs one step, waits for it and returns the loss."""
  net, head = ResNet(depth, width, stem='cifar'), MLP()
  h, net_variables = net.init_with_output(jax.random.key(0), images[:2], train=False)
  head_variables = head.init(jax.random.key(1), h, train=False)
  optimizer = optax.sgd(0.1, momentum=0.9)
  params = (net_variables['params'], head_variables['params'])
  stats = (net_variables['batch_stats'], head_variables['batch_stats'])
  state = (params, stats, optimizer.init(params))

  def loss(params, stats, x):
    h, s0 = net.apply(
      {'params': params[0], 'batch_stats': stats[0]}, x, True, mutable='batch_stats'
    )
    z, s1 = head.apply(
      {'params': params[1], 'batch_stats': stats[1]}, h, True, mutable='batch_stats'
    )
    return losses.nt_xent(z[-1], temperature)[0], (s0['batch_stats'], s1['batch_stats'])

  @jax.jit
  def step(state, x):
    params, stats, opt_state = state
    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params, stats, x)
    updates, opt_state = optimizer.update(grads, opt_state)
    return (optax.apply_updates(params, updates), stats, opt_state), value

  def run():
    nonlocal state
    state, value = step(state, images)
    return float(value)

  return run


def torch_step(depth, width, images, temperature=0.2):
  """The same in PyTorch."""
  import torch
  from torch import nn
  from torch.nn import functional as F

  def conv_bn(i, o, k, s):
    return nn.Sequential(nn.Conv2d(i, o, k, s, (k - 1) // 2, bias=False), nn.BatchNorm2d(o))

  class Block(nn.Module):
    def __init__(self, i, f, s, bottleneck, project):
      super().__init__()
      o = 4 * f if bottleneck else f
      shape = (
        [(i, f, 1, 1), (f, f, 3, s), (f, o, 1, 1)] if bottleneck else [(i, f, 3, s), (f, f, 3, 1)]
      )
      self.convs = nn.ModuleList(conv_bn(*a) for a in shape)
      self.proj = conv_bn(i, o, 1, s) if project else nn.Identity()

    def forward(self, x):
      y = x
      for c in self.convs[:-1]:
        y = F.relu(c(y))
      return F.relu(self.convs[-1](y) + self.proj(x))

  blocks, bottleneck = DEPTHS[depth]
  c = int(64 * width)
  layers, i = [conv_bn(3, c, 3, 1), nn.ReLU()], c
  for g, count in enumerate(blocks):
    for b in range(count):
      f = c * 2**g
      layers.append(Block(i, f, 2 if g and not b else 1, bottleneck, not b))
      i = 4 * f if bottleneck else f
  head = [nn.Linear(i, i, bias=False), nn.BatchNorm1d(i), nn.ReLU(), nn.Linear(i, 128, bias=False)]
  net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head, nn.BatchNorm1d(128))
  net = net.to(memory_format=torch.channels_last)
  x = torch.from_numpy(images.transpose(0, 3, 1, 2)).contiguous(memory_format=torch.channels_last)
  optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
  label = torch.arange(len(images)) ^ 1

  def run():
    z = F.normalize(net(x))
    logits = (z @ z.T / temperature).fill_diagonal_(float('-inf'))
    loss = F.cross_entropy(logits, label)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()

  return run


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--depth', type=int, default=8)
  parser.add_argument('--width', type=float, default=0.5)
  parser.add_argument('--batch', type=int, default=256, help='images per step, of two views each')
  parser.add_argument('--rounds', type=int, default=8)
  args = parser.parse_args()
  images = np.random.default_rng(0).random((2 * args.batch, 32, 32, 3), np.float32)
  steps = {'simclr_jax': jax_step(args.depth, args.width, images)}
  try:
    steps['torch'] = torch_step(args.depth, args.width, images)
  except ImportError:
    print('PyTorch is not installed, so there is no ratio: .venv/bin/pip install torch')
  times: dict[str, list[float]] = {name: [] for name in steps}
  for i in range(args.rounds + 1):
    for name, step in steps.items():
      start = time.perf_counter()
      step()
      if i:  # the first round compiles and warms up
        times[name].append(time.perf_counter() - start)
  for name, t in times.items():
    print(f'{name:10}  median {np.median(t):.3f} s/step  min {min(t):.3f}')
  if 'torch' in times:
    ratio = np.array(times['simclr_jax']) / np.array(times['torch'])
    print(
      f'ratio simclr_jax / torch: median {np.median(ratio):.2f}  ({ratio.min():.2f}-{ratio.max():.2f})'
    )


if __name__ == '__main__':
  main()
