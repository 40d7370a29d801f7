"""This project against PyTorch on one NVIDIA GPU: speed and memory of training steps, in one table of ratios.

    python benchmarks/gpu_bench.py [--rounds=3] [--out=runs/gpu_bench] [--torch-python=OTHER_ENVIRONMENT/bin/python]
    python benchmarks/gpu_bench.py --device=cpu --small     # tiny networks: shows that the script works

Needs JAX with CUDA; PyTorch with CUDA, torchvision and safetensors, if need be in another environment, which needs
nothing of this project. Everything measured goes to OUT/gpu_bench.json.

Steps: SimCLR (`simclr_imagenet:v1`) and MoCo v2 (`moco_imagenet:v2`) with ResNet-50, 224 pixels, bfloat16, batch size
256, or the largest power of two below it that fits in both; an epoch of `simclr_cifar10:v1` and `moco_cifar10` with
ResNet-18, batch size 512, bfloat16. Both sides:

- start from the same weights (`model.safetensors`, `load_torch.py`) and have the same network, head, BatchNorm groups,
  loss, optimizer (LARS for SimCLR, SGD for MoCo), learning rates, moving average, shuffling and queue. Before anything is
  timed, small networks get the same views in three steps with large learning rates, and their losses must agree;
- read uint8 images that are in device memory (random pixels: no step depends on what they show), so the input pipeline
  is not measured;
- augment on the GPU, with random numbers of its own for every image. torchvision.transforms.v2 draws one crop, one
  flip and one set of colours for a whole batch, so the PyTorch side is written here: `grid_sample` with a box and a flip
  for each image, then batched arithmetic, compiled. It does less than ours: its bilinear crop has no antialiasing, and its
  colours are torchvision's for SimCLR, too.

PyTorch has torch.compile, channels_last, autocast to bfloat16 and cuDNN's search for algorithms. Our step also computes
its metrics. Both run in processes of their own, by turns, for several rounds. Times are medians of a round, ratios are
median (range) over the rounds; above 1 is better for us in speed, below 1 in memory. Memory is the peak of arrays in use,
ours since the start of the process, with compilation, PyTorch's after the warm-up. Operations are those of the network's
convolutions and matrix products, counted by PyTorch, for both; the peak is the fastest large bfloat16 matrix product of
either.

NT-Xent: in blocks of rows against the whole matrix, both ours; temporary memory by the compiler's count.

To beat: on CIFAR-10 at batch size 512, lightly's SimCLR, 87 minutes for 200 epochs on an A6000, so 26 s an epoch, and
MoCo's demo, 20 s an epoch on a V100. The goal: at least PyTorch's speed, ratio >= 1.0, in at most its memory.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

GIB = 2**30
# Recipe, batch size, number and side of the images, warm-up steps, timed parts, steps in a part.
CASES = {
  'simclr_imagenet': ('simclr_imagenet:v1', 256, 1024, 256, 5, 5, 10),
  'moco_imagenet': ('moco_imagenet:v2', 256, 1024, 256, 5, 5, 10),
  'simclr_cifar10': ('simclr_cifar10:v1', 512, 50_000, 32, 20, 3, 97),
  'moco_cifar10': ('moco_cifar10', 512, 50_000, 32, 20, 3, 97),
}
TO_BEAT = {
  'simclr_cifar10': '26 s: lightly, A6000',
  'moco_cifar10': '20 s: MoCo, V100',
}
ROWS = (8192, 16_384, 32_768, 65_536)  # of NT-Xent
CHECKED = 3  # steps whose losses are compared


def case_of(name, small):
  """The values of `CASES`; with `small`, a few images of 40 pixels and few steps."""
  case = CASES[name]
  return (case[0], 32, 128, 40, 5, 3, 5) if small else case


def arrays(name, small):
  """Random images, uint8 `[N, side, side, 3]`."""
  count, side = case_of(name, small)[2:4]
  return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def timed(args, run, wait):
  """Seconds per step of each timed part.

  Args:
    args: of the command line.
    run: `run(i)` starts step i.
    wait: waits until all steps that were started are finished.
  """
  parts, steps = case_of(args.case, args.small)[5:]
  seconds, i = [], 0
  for _ in range(parts):
    start = time.perf_counter()
    for _ in range(steps):
      run(i)
      i += 1
    wait()
    seconds.append((time.perf_counter() - start) / steps)
  return seconds


def flops_of_product(args, product, wait):
  """FLOP/s of a large matrix product: `product()` starts it, `wait()` waits for all that were started."""
  product()
  wait()
  start = time.perf_counter()
  for _ in range(20):
    product()
  wait()
  return 20 * 2 * side_of_product(args) ** 3 / (time.perf_counter() - start)


def side_of_product(args):
  return 512 if args.small else 8192


# Ours.


def recipe(args):
  """The recipe of a case. To compare losses: float32, keys that are not shuffled, and large rates, so that errors show."""
  from simclr_jax import config

  moco = args.case.startswith('moco')
  float32 = args.check or args.device == 'cpu'
  fields = {
    'batch_size': args.batch,
    'steps': 10_000,
    'dtype': 'float32' if float32 else 'bfloat16',
    'data.num_classes': 0,  # no online probe
  }
  if args.small:
    fields |= {'model.depth': 8, 'model.width_multiplier': 0.25, 'image_size': 32}
    fields |= {'queue_size': 128} if moco else {}
  if args.check:
    fields |= {'learning_rate_scaling': 'none', 'weight_decay': 0.1 if moco else 1.0}
    fields |= {'learning_rate': 0.5 if moco else 2.0}
    fields |= {'shuffle': 'none', 'key_momentum': 0.9} if moco else {'warmup_epochs': 0}
  return config.load(case_of(args.case, args.small)[0], fields)


def ours(args):
  """Times the training step of this project; `--check`: its first losses. Writes what PyTorch needs into the folder."""
  import jax
  import jax.numpy as jnp

  from simclr_jax import train_state
  from simclr_jax.data import Arrays

  if args.check:
    jax.config.update('jax_default_matmul_precision', 'highest')  # not TF32
  config = recipe(args)
  images = arrays(args.case, args.small)
  state, step = train_state.build(config, Arrays(images, np.full(len(images), -1, np.int32)))
  write_for_torch(args, config, state, len(images))
  if args.check:
    return {'losses': first_losses(args, config, state, step)}

  def run(i):
    nonlocal state
    state, _ = step(state, i)

  def wait():
    jax.block_until_ready(state)

  warmup = case_of(args.case, args.small)[4]
  for i in range(warmup):
    run(i)
  wait()
  seconds = timed(args, lambda i: run(warmup + i), wait)
  step.loader.close()
  device = jax.local_devices()[0]
  memory = (device.memory_stats() or {}).get('peak_bytes_in_use')
  a = jnp.ones((side_of_product(args),) * 2, jnp.bfloat16)
  product, last = jax.jit(lambda a: a @ a), None

  def start_product():
    nonlocal last
    last = product(a)

  peak = flops_of_product(args, start_product, lambda: jax.block_until_ready(last))
  return {
    'seconds': seconds, 'memory': memory, 'peak': peak, 'device': device.device_kind, 'version': f'jax {jax.__version__}',
  }  # fmt: skip


def write_for_torch(args, config, state, examples):
  """Writes initial weights, the program that builds the network in PyTorch, the recipe and the learning rates."""
  import jax
  from safetensors.numpy import save_file

  from simclr_jax import config as recipes, optim
  from simclr_jax.interop import model as models, torch_loader
  from simclr_jax.models import network

  params, stats = jax.device_get((state.params, state.state['stats']))
  variables = {
    'encoder': network.encoder(params, stats),
    'head': {'params': params['head'], 'batch_stats': stats['head']},
  }
  model = models.Model(recipes.architecture(config), variables, 'projection', {})
  mean, std = models.normalization(model.architecture)
  tensors = model.tensors()
  save_file(tensors, args.out / 'model.safetensors')
  (args.out / 'load_torch.py').write_text(torch_loader.text(model, mean, std))
  if 'queue' in state.state:
    np.save(args.out / 'queue.npy', state.state['queue']['rows'])
  rates = jax.vmap(optim.schedule(config, examples))(np.arange(1000)).tolist()
  values = {'recipe': recipes.flatten(config), 'rates': rates, 'mean': mean, 'std': std}
  (args.out / 'step.json').write_text(json.dumps(values))


def first_losses(args, config, state, step):
  """The losses of the first steps, whose views are written for PyTorch: the first view of all images, then the second."""
  import jax

  from simclr_jax.data import augment, loader

  views = jax.jit(augment.views, static_argnums=(3, 5))
  pipelines = augment.pipelines(config.augment, 2)
  losses = []
  for i in range(CHECKED):
    batch = loader.with_images(step.loader.constants, step.loader(i))
    x = views(
      batch['images'], batch['epoch'], batch['position'], pipelines, config.seed, config.image_size
    )
    np.save(args.out / f'views{i}.npy', np.concatenate([x[:, 0], x[:, 1]]))
    state, metrics = step(state, i)
    losses.append(float(metrics['loss']))
  step.loader.close()
  return losses


# PyTorch's. Nothing of this project is imported.

# Smallest area of a crop, its interpolation; strengths of brightness, contrast, saturation and hue; radius of the blur,
# its padding, and whether all images of a batch share its sigma.
AUGMENTATIONS = {
  'simclr_v1': (0.08, 'bicubic', (0.8, 0.8, 0.8, 0.2), 11, 'constant', True),
  'simclr_cifar10_v1': (0.08, 'bicubic', (0.4, 0.4, 0.4, 0.1), 0, '', False),
  'moco_v2': (0.2, 'bilinear', (0.4, 0.4, 0.4, 0.1), 8, 'replicate', False),
  'moco_cifar10': (0.08, 'bilinear', (0.4, 0.4, 0.4, 0.1), 0, '', False),
}


def torch_views(images, pipeline, size):
  """A random view of every image.

  Args:
    images: uint8 `[n, side, side, 3]`.
    pipeline: a key of `AUGMENTATIONS`.
    size: of the views.

  Returns:
    float32 `[n, 3, size, size]` in [0, 1].
  """
  import torch
  from torch.nn import functional as F

  area, mode, strengths, radius, padding, shared = AUGMENTATIONS[pipeline]
  n, device = len(images), images.device

  def uniform(low, high, *shape):
    return low + (high - low) * torch.rand(shape, device=device)

  def each(values):  # one value for each image
    return values.view(n, 1, 1, 1)

  def happens(p):
    return each(uniform(0, 1, n) < p)

  # Random crop and flip: ten boxes are drawn for every image, the first that fits is used; sides are fractions.
  areas = uniform(area, 1, n, 10)
  ratios = torch.exp(uniform(float(np.log(3 / 4)), float(np.log(4 / 3)), n, 10))
  widths, heights = (areas * ratios).sqrt(), (areas / ratios).sqrt()
  fits = (widths <= 1) & (heights <= 1)
  first = fits.int().argmax(1, keepdim=True)
  fits = fits.any(1, keepdim=True)
  w, h = (torch.where(fits, sides.gather(1, first), 1.0) for sides in (widths, heights))
  left, top = uniform(0, 1, n, 1) * (1 - w), uniform(0, 1, n, 1) * (1 - h)
  pixel = (torch.arange(size, device=device) + 0.5) / size
  flipped = torch.where(uniform(0, 1, n, 1) < 0.5, 1 - pixel, pixel)
  x, y = left + w * flipped, top + h * pixel  # [n, size]
  grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1) * 2 - 1
  image = images.permute(0, 3, 1, 2).float() / 255
  image = F.grid_sample(image, grid, mode, 'border', align_corners=False).clamp(0, 1)

  # Colours, in an order of its own for every image.
  b, c, s = (each(uniform(1 - strength, 1 + strength, n)) for strength in strengths[:3])
  turns = each(uniform(-strengths[3], strengths[3], n))
  order = uniform(0, 1, n, 4).argsort(1)
  changed = image
  for i in range(4):
    gray = torch_gray(changed)
    mean = gray.mean((1, 2, 3), keepdim=True)
    options = (changed * b, mean + (changed - mean) * c, gray + (changed - gray) * s)
    result = torch_hue(changed, turns)
    for op, option in enumerate(options):
      result = torch.where(each(order[:, i] == op), option, result)
    changed = result.clamp(0, 1)
  image = torch.where(happens(0.8), changed, image)
  image = torch.where(happens(0.2), torch_gray(image).expand_as(image), image)
  if not radius:
    return image

  # Gaussian blur: a sum of shifted images, first along the rows, then along the columns.
  sigma = uniform(0.1, 2, 1, 1).expand(n, 1) if shared else uniform(0.1, 2, n, 1)
  kernel = torch.exp(-(torch.arange(-radius, radius + 1, device=device) ** 2) / (2 * sigma**2))
  kernel = kernel / kernel.sum(1, keepdim=True)
  blurred = image
  for dim, pad in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
    padded = F.pad(blurred, pad, padding)
    taps = [each(kernel[:, i]) * padded.narrow(dim, i, size) for i in range(2 * radius + 1)]
    blurred = sum(taps)
  return torch.where(happens(0.5), blurred, image)


def torch_gray(image):
  """The luma `[n, 1, h, w]`."""
  return 0.2989 * image[:, :1] + 0.587 * image[:, 1:2] + 0.114 * image[:, 2:]


def torch_hue(image, turns):
  """The image with its hue shifted by `turns` `[n, 1, 1, 1]` of a full turn, in HSV."""
  import torch

  r, g, b = image.unbind(1)
  value = image.amax(1)
  chroma = value - image.amin(1)
  safe = torch.where(chroma > 0, chroma, 1.0)
  hue = torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
  hue = torch.where(value == r, (g - b) / safe, hue) + 6 * turns[:, 0]
  channels = []
  for offset in (5, 3, 1):
    k = (offset + hue) % 6
    channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
  return torch.stack(channels, 1)


def split_norm(norm, groups, strided):
  """`nn.BatchNorm2d` with the weights of `norm` whose statistics are those of each of `groups` parts of the batch.

  Part i has the i-th block of rows; if `strided`, the rows i, i + groups, i + 2 groups, ...
  """
  import torch
  from torch import nn

  class SplitNorm(nn.BatchNorm2d):
    def forward(self, x):
      shape = (-1, groups) if strided else (groups, x.shape[0] // groups)
      y = x.float().reshape(*shape, *x.shape[1:])
      dims = (0 if strided else 1, 3, 4)
      var, mean = torch.var_mean(y, dims, correction=0, keepdim=True)
      values = y.numel() / groups / y.shape[2]
      with torch.no_grad():
        self.running_mean.lerp_(mean.mean((0, 1)).flatten(), self.momentum)
        self.running_var.lerp_(var.mean((0, 1)).flatten() * values / (values - 1), self.momentum)
      factor = self.weight[:, None, None] * torch.rsqrt(var + self.eps)
      return ((y - mean) * factor + self.bias[:, None, None]).to(x.dtype).reshape(x.shape)

  new = SplitNorm(norm.num_features)
  new.load_state_dict(norm.state_dict())
  return new


def torch_network(args, recipe):
  """The network with the weights of ours, in training mode and channels_last."""
  import torch
  from torch import nn

  scope = {'__file__': str(args.out / 'load_torch.py')}
  exec((args.out / 'load_torch.py').read_text(), scope)
  net = scope['load']().train()
  if recipe['model.head_norm'] == 'all':
    net.fc[-1].bias.requires_grad_(False)  # SimCLR's last BatchNorm has no offset
  if recipe['model.bn_groups'] > 1:
    for name, module in list(net.named_modules()):
      if isinstance(module, nn.BatchNorm2d):
        parent, _, child = name.rpartition('.')
        new = split_norm(module, recipe['model.bn_groups'], recipe['model.bn_layout'] == 'strided')
        setattr(net.get_submodule(parent), child, new)
  return net.to(args.device, memory_format=torch.channels_last)


def torch_lars(params, decay, momentum):
  """LARS as in SimCLR: a function of the learning rate that updates `params`; vectors have neither decay nor adaptation."""
  import torch

  kernels, vectors = [p for p in params if p.ndim > 1], [p for p in params if p.ndim == 1]
  trace = [torch.zeros_like(p) for p in kernels + vectors]

  @torch.no_grad()
  def update(rate):
    updates = list(torch._foreach_add([p.grad for p in kernels], kernels, alpha=decay))
    p, u = (torch.stack(torch._foreach_norm(x)) for x in (kernels, updates))
    ratios = torch.where((p > 0) & (u > 0), 0.001 * p / u, 1.0)
    torch._foreach_mul_(updates, list(ratios.unbind()))
    updates += [p.grad for p in vectors]
    torch._foreach_mul_(updates, rate)
    torch._foreach_mul_(trace, momentum)
    torch._foreach_add_(trace, updates)
    torch._foreach_sub_(kernels + vectors, trace)

  return update


def torch_step(args, recipe, values):
  """The training step in PyTorch.

  Returns:
    `step(i, views, permutation) -> loss`: views `[2n, 3, h, w]` in [0, 1], the first of all images, then the second; the
    permutation `[n]` of the keys; and `objective(views, permutation)`, the loss without torch.compile.
  """
  import torch
  from torch.nn import functional as F

  net = torch_network(args, recipe)
  params = [p for p in net.parameters() if p.requires_grad]
  mean, std = (torch.tensor(values[k], device=args.device).view(3, 1, 1) for k in ('mean', 'std'))
  autocast = torch.autocast(args.device, torch.bfloat16, enabled=recipe['dtype'] == 'bfloat16')
  moco, momentum, decay = recipe['method'] == 'moco', recipe['momentum'], recipe['weight_decay']
  zero_grad = torch.optim.SGD(params, 0.1).zero_grad

  def encode(net, views):
    views = ((views - mean) / std).contiguous(memory_format=torch.channels_last)
    with autocast:
      z = net(views)
    return F.normalize(z.float())

  def compiled(f):
    return torch.compile(f, mode=None if args.torch_mode == 'default' else args.torch_mode)

  if moco:
    key_net = torch_network(args, recipe).requires_grad_(False)
    key_params = list(key_net.parameters())
    queue = torch.from_numpy(np.load(args.out / 'queue.npy')).to(args.device)
    sgd = torch.optim.SGD(params, 0.1, momentum, weight_decay=decay, fused=True)

    def update(rate):
      sgd.param_groups[0]['lr'] = rate
      sgd.step()

    def keys(views, permutation):
      with torch.no_grad():
        return encode(key_net, views[permutation])[permutation.argsort()]

    def contrast(views, k):
      q = encode(net, views)
      logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / recipe['temperature']
      return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))

    def objective(views, permutation):
      queries, others = views.chunk(2)
      return contrast(queries, keys(others, permutation))

    fast_keys, fast_contrast = compiled(keys), compiled(contrast)
  else:
    update = torch_lars(params, decay, momentum)

    def objective(views, permutation=None):
      z = encode(net, views)
      n = len(z) // 2
      logits = (z @ z.T / recipe['temperature']).fill_diagonal_(float('-inf'))
      return F.cross_entropy(logits, (torch.arange(2 * n, device=z.device) + n) % (2 * n))

    fast_objective = compiled(objective)

  def step(i, views, permutation):
    if moco:
      torch._foreach_lerp_(key_params, list(net.parameters()), 1 - recipe['key_momentum'])
      queries, others = views.chunk(2)
      k = fast_keys(others, permutation)
      loss = fast_contrast(queries, k)
      loss.backward()
      start = i * len(k) % len(queue)
      queue[start : start + len(k)] = k
    else:
      loss = fast_objective(views)
      (recipe['loss_scale'] * loss).backward()
    update(values['rates'][i])
    zero_grad()
    return loss.detach()

  return step, objective


def torchs(args):
  """Times the training step in PyTorch; `--check`: its losses for the views that ours has written."""
  import torch
  from torch.utils.flop_counter import FlopCounterMode

  values = json.loads((args.out / 'step.json').read_text())
  recipe, cuda = values['recipe'], args.device == 'cuda'
  n, size = recipe['batch_size'], recipe['image_size']
  torch.manual_seed(0)
  torch.backends.cudnn.benchmark = True
  torch.backends.cudnn.allow_tf32 = not args.check
  step, objective = torch_step(args, recipe, values)
  if args.check:
    losses = []
    for i in range(CHECKED):
      views = torch.from_numpy(np.load(args.out / f'views{i}.npy').transpose(0, 3, 1, 2))
      permutation = torch.arange(n, device=args.device)
      losses.append(step(i, views.to(args.device), permutation).item())
    return {'losses': losses}
  images = torch.from_numpy(arrays(args.case, args.small)).to(args.device)
  order = torch.randperm(len(images), device=args.device)
  per_epoch = len(images) // n

  @torch.compile
  def views(index):
    return torch_views(images[index.repeat(2)], recipe['augment.view1'], size)

  def run(i):
    nonlocal order
    if i % per_epoch == 0:
      order = torch.randperm(len(images), device=args.device)
    index = order[i % per_epoch * n :][:n]
    step(i, views(index), torch.randperm(n, device=args.device))

  def wait():
    if cuda:
      torch.cuda.synchronize()

  warmup = case_of(args.case, args.small)[4]
  for i in range(warmup):
    run(i)
  wait()
  if cuda:
    torch.cuda.reset_peak_memory_stats()
  seconds = timed(args, lambda i: run(warmup + i), wait)
  memory = torch.cuda.max_memory_allocated() if cuda else None
  a = torch.ones((side_of_product(args),) * 2, dtype=torch.bfloat16, device=args.device)
  peak = flops_of_product(args, lambda: a @ a, wait)
  few = min(n, 16)
  with FlopCounterMode(display=False) as counter:
    x = torch.rand((2 * few, 3, size, size), device=args.device)
    objective(x, torch.arange(few, device=args.device)).backward()
  return {
    'seconds': seconds, 'memory': memory, 'peak': peak, 'flops': counter.get_total_flops() * n / few,
    'device': torch.cuda.get_device_name() if cuda else 'cpu', 'version': f'torch {torch.__version__}',
  }  # fmt: skip


# NT-Xent.


def nt_xent(args):
  """Seconds and temporary memory of loss and gradient of NT-Xent, `--batch` rows: in blocks, and with the whole matrix."""
  import jax
  import jax.numpy as jnp
  import nt_xent as bench

  m = args.batch
  z = jnp.asarray(np.random.default_rng(0).normal(size=(m, bench.D)), jnp.float32)
  limit = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit', 4 * GIB)
  programs, results = {}, {}
  for name in ('blocks', 'whole'):
    program = bench.compiled(bench.nt_xent, z.shape, whole=name == 'whole')
    memory = program.memory_analysis().temp_size_in_bytes
    results[name] = {'memory': memory, 'seconds': []}
    if memory < 0.8 * limit:
      programs[name] = program
      bench.seconds(program, z)
  for _ in range(5 if args.small else 20):
    for name, program in programs.items():
      results[name]['seconds'].append(bench.seconds(program, z))
  return results


# The processes.


def work(args):
  """Runs a worker and writes its result as JSON; a worker that has too little memory says so."""
  worker = {'ours': ours, 'torch': torchs, 'nt_xent': nt_xent}[args.worker]
  try:
    result = worker(args)
  except Exception as error:  # of JAX or PyTorch, whose types this process may not have
    if not any(s in f'{error!r}' for s in ('RESOURCE_EXHAUSTED', 'OutOfMemory', 'out of memory')):
      raise
    result = {'out_of_memory': True}
  (args.out / f'{args.worker}.json').write_text(json.dumps(result))


def environment(args):
  """The environment of the processes."""
  return {
    **os.environ,
    'JAX_PLATFORMS': 'cpu' if args.device == 'cpu' else 'cuda,cpu',
    'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.92',
    'JAX_COMPILATION_CACHE_DIR': str(args.out.resolve() / 'jax_cache'),
    'TORCHINDUCTOR_CACHE_DIR': str(args.out.resolve() / 'torch_cache'),
  }


def start(args, worker, case, batch, small=False, check=False):
  """Runs a worker in a process of its own; returns its result."""
  folder = (args.out / f'{case}{"_check" * check}').resolve()
  folder.mkdir(parents=True, exist_ok=True)
  command = [
    args.torch_python if worker == 'torch' else sys.executable, __file__, f'--worker={worker}', f'--case={case}',
    f'--batch={batch}', f'--device={args.device}', f'--out={folder}', f'--torch-mode={args.torch_mode}',
    *['--small'] * (small or args.small), *['--check'] * check,
  ]  # fmt: skip
  if subprocess.run(command, env=environment(args)).returncode:
    raise SystemExit(f'gpu_bench: the worker failed: {" ".join(command)}')
  return json.loads((folder / f'{worker}.json').read_text())


def check_machine(args):
  """Exits with 2 and a sentence if a package or the GPU is missing."""
  gpu = args.device == 'cuda'
  programs = (
    (sys.executable, 'import simclr_jax, jax' + '; jax.devices("cuda")' * gpu),
    (args.torch_python, 'import safetensors, torch, torchvision' + '; torch.ones(1).cuda()' * gpu),
  )
  for python, program in programs:
    command = [python, '-c', program]
    found = subprocess.run(command, env=environment(args), capture_output=True, text=True)
    if found.returncode:
      reason = found.stderr.strip().splitlines()[-1]
      print(
        f'gpu_bench needs one NVIDIA GPU, JAX with CUDA, and PyTorch with CUDA, torchvision and safetensors; {python} says: '
        f'{reason} (--device=cpu --small tries the script without a GPU)',
        file=sys.stderr,
      )
      raise SystemExit(2)


def check_losses(args):
  """The first losses of ours and of PyTorch's step for the same weights and views; exits if they differ."""
  tolerance = 1e-4 if args.device == 'cpu' else 1e-3
  found = {}
  for case in CASES:
    results = [
      start(args, worker, case, 32, small=True, check=True)['losses']
      for worker in ('ours', 'torch')
    ]
    difference = np.abs(np.divide(*results) - 1).max()
    print(
      f'{case}: losses {results[0]} and {results[1]}, relative difference {difference:.1e}',
      flush=True,
    )
    if not difference < tolerance:
      raise SystemExit(f'gpu_bench: the steps of {case} are not the same')
    found[case] = results
  return found


def rounds(args, case):
  """The batch size that fits, and the results of every round: [{'ours': ..., 'torch': ...}, ...]."""
  batch, found = case_of(case, args.small)[1], []
  while len(found) < args.rounds:
    # Ours is first in the first round, because it writes the weights for PyTorch; then they alternate.
    names = ('torch', 'ours') if len(found) % 2 else ('ours', 'torch')
    results = {name: start(args, name, case, batch) for name in names}
    if any('out_of_memory' in result for result in results.values()):
      batch, found = batch // 2, []
      print(f'{case}: out of memory, now with batch size {batch}', flush=True)
      continue
    found.append(results)
  return batch, found


def spread(values):
  return f'{np.median(values):.2f} ({min(values):.2f}-{max(values):.2f})'


def gib(value):
  return f'{value / GIB:.2f}' if value else ''


def step_row(case, batch, found, peak):
  """The cells of a line for a training step."""
  seconds = {k: [np.median(r[k]['seconds']) for r in found] for k in ('ours', 'torch')}
  memory = {k: max(r[k]['memory'] or 0 for r in found) for k in seconds}
  flops, cells = found[0]['torch']['flops'], []
  for k, times in seconds.items():
    s = np.median(times)
    rate = flops / s
    cells += [
      f'{batch / s:,.0f}', f'{1000 * s:.1f}', gib(memory[k]), f'{rate / 1e12:.3g} ({100 * rate / peak:.0f} %)',
    ]  # fmt: skip
  ratio = spread(np.divide(seconds['torch'], seconds['ours']))
  less = f'{memory["ours"] / memory["torch"]:.2f}' if memory['torch'] else ''
  epoch = ''
  if case in TO_BEAT and batch == CASES[case][1]:
    steps = CASES[case][2] // CASES[case][1]
    epoch = ' and '.join(f'{steps * np.median(t):.1f}' for t in seconds.values())
    epoch = f'{epoch} s ({TO_BEAT[case]})'
  return [case, batch, *cells, ratio, less, epoch]


def nt_xent_row(rows, result):
  """The cells of a line for NT-Xent: blocks in the columns of ours, the whole matrix in those of PyTorch."""
  cells = []
  for name in ('blocks', 'whole'):
    times = result[name]['seconds']
    cells += [
      '',
      f'{1000 * np.median(times):.2f}' if times else 'too large',
      gib(result[name]['memory']),
      '',
    ]
  whole, blocks = (result[name]['seconds'] for name in ('whole', 'blocks'))
  ratio = spread(np.divide(whole, blocks)) if whole else ''
  less = f'{result["blocks"]["memory"] / result["whole"]["memory"]:.3f}'
  return ['NT-Xent, blocks and whole', f'2n = {rows:,}', *cells, ratio, less, '']


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('runs/gpu_bench'))
  parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
  parser.add_argument('--small', action='store_true', help='tiny networks, few steps')
  parser.add_argument('--torch-python', default=sys.executable, help='the Python that has PyTorch')
  parser.add_argument('--torch-mode', default='default', help='mode of torch.compile')
  parser.add_argument('--worker', help=argparse.SUPPRESS)
  parser.add_argument('--case', help=argparse.SUPPRESS)
  parser.add_argument('--batch', type=int, help=argparse.SUPPRESS)
  parser.add_argument('--check', action='store_true', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    work(args)
    return
  if args.device == 'cpu' and not args.small:
    parser.error('--device=cpu is for --small only')
  check_machine(args)
  results = {'losses': check_losses(args), 'steps': {}, 'nt_xent': {}}

  def save():
    (args.out / 'gpu_bench.json').write_text(json.dumps(results, indent=1))

  for case in CASES:
    batch, found = rounds(args, case)
    results['steps'][case] = {'batch': batch, 'rounds': found}
    save()
  for rows in (256, 512) if args.small else ROWS:
    results['nt_xent'][rows] = start(args, 'nt_xent', 'nt_xent', rows)
    save()
  report(results)


def report(results):
  """Prints the table."""
  every = [r[k] for case in results['steps'].values() for r in case['rounds'] for k in r]
  peak = max(result['peak'] for result in every)
  machine = ', '.join(sorted({r[k] for r in every for k in ('device', 'version')}))
  print(f'\n{machine}; large bfloat16 matrix product: {peak / 1e12:.3g} TFLOP/s\n')
  side = ['images/s', 'ms', 'GiB', 'TFLOP/s']
  names = [f'{who}: {what}' for who in ('ours', 'PyTorch') for what in side]
  lines = [['', 'batch', *names, 'speed, ours / PyTorch', 'memory', 'epoch, ours and PyTorch']]
  lines.append(['---'] * len(lines[0]))
  lines += [
    step_row(case, value['batch'], value['rounds'], peak)
    for case, value in results['steps'].items()
  ]
  lines += [nt_xent_row(rows, result) for rows, result in results['nt_xent'].items()]
  for cells in lines:
    print(f'| {" | ".join(map(str, cells))} |')


if __name__ == '__main__':
  main()
