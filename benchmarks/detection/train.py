"""Object detection as a test of features: fine-tunes Faster R-CNN on VOC, reports AP, AP50 and AP75 (MoCo, section 4.2.1).

    python benchmarks/detection/train.py --data=VOCdevkit --weights=FOLDER --out=runs/voc [--seeds=5]
    torchrun --nproc-per-node=8 benchmarks/detection/train.py ...

DIR of --data contains VOC2007 and VOC2012, or images of your own in the same layout, with other classes. FOLDER is
written by `simclr-jax export --to=safetensors`; a file of torchvision's names, or `random`, is also possible. The same
command resumes. Needs torch, torchvision, Pillow and safetensors. docs/detection.md has commands, published numbers and
the differences to detectron2.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import average_precision
import detector
import numpy as np
import torch
import torchvision
import voc
from torch import distributed as dist, nn
from voc import Problem

STOPPED = 75  # exit code after a signal
NOT_SETTINGS = ('data', 'out', 'seeds', 'workers', 'device', 'save_every', 'log_every')
stopping = False


class Place(NamedTuple):
  """Where this process computes: one of `world` processes, each with its own device."""

  device: torch.device
  rank: int
  world: int

  def say(self, text: str) -> None:
    """Prints a line, once."""
    if self.rank == 0:
      print(text, flush=True)

  def any(self, *flags: bool) -> list[bool]:
    """Whether each flag is set in any process."""
    if self.world == 1:
      return list(flags)
    both = torch.tensor(flags, dtype=torch.float32, device=self.device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return [bool(x) for x in both.tolist()]


def main() -> int:
  args = arguments()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
  try:
    return run(args)
  except torch.cuda.OutOfMemoryError:
    problem = 'the GPU has not enough memory: use a smaller --batch, or more GPUs'
  except (Problem, OSError) as error:
    problem = str(error)
  print(f'error: {printable(problem)}', file=sys.stderr)
  return 1


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--data', type=pathlib.Path, required=True, metavar='DIR')
  parser.add_argument('--train', default='VOC2007/trainval,VOC2012/trainval', metavar='SPLITS',
    help='lists of training images, such as VOC2007/trainval, or train if DIR has no years')  # fmt: skip
  parser.add_argument('--test', default='VOC2007/test', metavar='SPLITS')
  parser.add_argument('--classes', default='', metavar='NAME,...', help='default: those of the training images')  # fmt: skip
  parser.add_argument('--weights', required=True, help='folder or file, or random')
  parser.add_argument('--variant', default='', choices=('', *detector.VARIANTS))
  parser.add_argument('--normalize', default='', choices=('', *detector.NORMALIZE))
  parser.add_argument('--depth', type=int, default=50, choices=tuple(detector.DEPTHS), help='of random weights')  # fmt: skip
  parser.add_argument('--model', default='c4', choices=('c4', 'fpn'))
  parser.add_argument('--out', type=pathlib.Path, required=True, metavar='DIR')
  parser.add_argument('--metric', default='', choices=('', *average_precision.METRICS), help='default: voc07 if the test images are those of VOC2007, else area')  # fmt: skip
  parser.add_argument('--batch', type=positive, default=16, help='images per step, on all GPUs')
  parser.add_argument('--iterations', type=positive, help='default: 24,000 * 16 / batch')
  parser.add_argument('--warmup', type=int, help='iterations (default: 100 * 16 / batch)')
  parser.add_argument('--lr', type=float, help='default: 0.02 * batch / 16')
  parser.add_argument('--train-sizes', type=sizes, default=list(range(480, 801, 32)), help='short sides of training images')  # fmt: skip
  parser.add_argument('--test-size', type=positive, default=800)
  parser.add_argument('--longest', type=positive, default=1333, help='limit of the long side')
  parser.add_argument('--regions', type=positive, default=512, help='regions per training image')
  parser.add_argument('--precise-bn', type=int, default=200, metavar='BATCHES', help='from which the statistics of BatchNorm are computed again before the test; 0: not')  # fmt: skip
  parser.add_argument('--seeds', type=positive, default=1, help='number of trainings')
  parser.add_argument('--save-every', type=positive, default=1000)
  parser.add_argument('--log-every', type=positive, default=20)
  parser.add_argument('--workers', type=int, default=4, help='processes that decode images, for each GPU')  # fmt: skip
  parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
  args = parser.parse_args()
  args.iterations = args.iterations or max(1, 24_000 * 16 // args.batch)
  args.warmup = 100 * 16 // args.batch if args.warmup is None else args.warmup
  args.lr = 0.02 * args.batch / 16 if args.lr is None else args.lr
  if not (math.isfinite(args.lr) and args.lr > 0):
    parser.error('--lr is not above 0')
  if min(args.warmup, args.workers, args.precise_bn) < 0:
    parser.error('--warmup, --workers and --precise-bn are not below 0')
  if not args.metric:
    args.metric = 'voc07' if all(s.strip().startswith('VOC2007/') for s in args.test.split(',')) else 'area'  # fmt: skip
  return args


def positive(text: str) -> int:
  """A number of at least 1."""
  if int(text) < 1:
    raise ValueError
  return int(text)


def sizes(text: str) -> list[int]:
  """Numbers joined by commas."""
  return [positive(part) for part in text.split(',')]


def run(args: argparse.Namespace) -> int:
  """Trains and evaluates each seed that has no result yet; returns the exit code."""
  place = start(args)
  data = load_data(args)
  weights = detector.load(args.weights, args.depth, args.variant, args.normalize)
  if args.batch % place.world:
    raise Problem(f'--batch={args.batch} is no multiple of the number of processes, {place.world}')
  settings = {k: v for k, v in vars(args).items() if k not in NOT_SETTINGS}
  settings |= {'depth': weights.depth, 'variant': weights.variant, 'mean': weights.mean, 'std': weights.std}  # fmt: skip
  settings |= {'checksum': weights.checksum, 'train_images': len(data[0]), 'test_images': len(data[1])}  # fmt: skip
  settings |= {'processes': place.world, 'classes': data[0].classes}
  place.say(
    f'{len(data[0]):,} training images with boxes, {len(data[1]):,} test images, {len(data[0].classes)} classes; '
    f'ResNet-{weights.depth} {weights.variant}, {args.model}; {args.iterations:,} iterations of {args.batch} images, '
    f'learning rate {args.lr:g} (0.02 for 16 images); {place.world} x {hardware(place)}'
  )
  results = []
  for seed in range(args.seeds):
    folder = args.out / f'seed{seed}'
    folder.mkdir(parents=True, exist_ok=True)
    result = finished(folder / 'result.json', settings)
    if result is None:
      result = one_seed(args, weights, data, folder, {**settings, 'seed': seed}, place)
    if result is None:
      return STOPPED
    results.append(result)
    place.say(f'seed {seed}: ' + ', '.join(f'{k} {result[k]:.2f}' for k in ('AP', 'AP50', 'AP75')))
  if place.rank == 0:
    summary = summarize(results, settings, place)
    write_json(args.out / 'results.json', summary)
  return 0


def start(args) -> Place:
  """The device of this process."""
  rank, world = (int(os.environ.get(name, default)) for name, default in (('RANK', 0), ('WORLD_SIZE', 1)))  # fmt: skip
  cuda = args.device == 'cuda' and torch.cuda.is_available()
  if cuda:
    torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))
  place = Place(torch.device('cuda' if cuda else 'cpu'), rank, world)
  if args.device == 'cuda' and not cuda:
    place.say('no GPU: runs on the CPU')
  if world > 1 and not dist.is_initialized():
    dist.init_process_group('nccl' if cuda else 'gloo')
  return place


def load_data(args) -> tuple[voc.Images, voc.Images]:
  """Training and test images; training images without a box are left out, as by detectron2."""
  train = [record for record in voc.read(args.data, args.train) if record['names']]
  if not train:
    raise Problem(f'no image of --train={args.train} has a box')
  names = [name.strip() for name in args.classes.split(',') if name.strip()]
  names = names or sorted({name for record in train for name in record['names']})
  test = voc.read(args.data, args.test)
  if all(record['difficult'].all() for record in test):
    raise Problem(f'no image of --test={args.test} has a box that is not difficult')
  return voc.Images(train, names), voc.Images(test, names)


def one_seed(args, weights, data, folder, settings, place) -> dict[str, Any] | None:
  """Trains and evaluates; None after a signal."""
  torch.manual_seed(settings['seed'])
  model = detector.build(
    args.model, weights, len(data[0].classes), args.train_sizes, args.test_size, args.longest, args.regions
  )  # fmt: skip
  model.to(place.device)
  if place.world > 1 and place.device.type == 'cuda':
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
  if not train(model, args, data[0], folder / 'checkpoint.pt', settings, place):
    return None
  if args.precise_bn and not precise_bn(model, args, data[0], settings['seed'], place):
    return None
  found = detect(model, data[1], args, place)
  if found is None:
    return None
  result = average_precision.evaluate(data[1].records, found, args.metric)
  result['per_class'] = {data[1].classes[c - 1]: ap for c, ap in result['per_class'].items()}
  result |= {'settings': settings, 'iterations': args.iterations}
  if place.rank == 0:
    write_json(folder / 'result.json', result)
  return result


# Training.


def train(model, args, images, path, settings, place) -> bool:
  """Trains from the checkpoint at `path`, or from the start; False after a signal."""
  optimizer = torch.optim.SGD(groups(model), lr=args.lr, momentum=0.9)
  first = resume(path, model, optimizer, settings)
  if first:
    place.say(f'resumes at iteration {first:,}')
  parallel = model
  if place.world > 1:
    parallel = nn.parallel.DistributedDataParallel(model)
  model.train()
  began, seen = time.monotonic(), 0
  batches = loader(images, args, settings['seed'], first, args.iterations, place)
  for i, batch in enumerate(batches, first):
    losses = step(parallel, optimizer, batch, learning_rate(i, args), (settings['seed'], i), place)
    total = float(sum(losses.values()))
    broken, stopped = place.any(not math.isfinite(total), stopping)
    if broken:
      raise Problem(f'the loss is not finite at iteration {i + 1:,}: use a smaller --lr or a longer --warmup')  # fmt: skip
    done, seen = i + 1, seen + 1
    if not done % args.log_every or done == args.iterations:
      place.say(report(done, args, losses, total, (time.monotonic() - began) / seen, place))
    if stopped or not done % args.save_every or done == args.iterations:
      state = {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'iteration': done}
      if place.rank == 0:
        state['settings'] = json.dumps(settings, sort_keys=True)
        write(path, functools.partial(torch.save, state))
    if stopped:
      place.say(f'stopped after iteration {done:,}; the same command resumes')
      return False
  return True


def groups(model: nn.Module) -> list[dict[str, Any]]:
  """Parameter groups: BatchNorm has no weight decay, as in detectron2."""
  norms = [p for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()]  # fmt: skip
  others = [p for p in model.parameters() if all(p is not norm for norm in norms)]
  return [{'params': others, 'weight_decay': 1e-4}, {'params': norms, 'weight_decay': 0.0}]


def learning_rate(i: int, args: argparse.Namespace) -> float:
  """Linear warm-up from a thousandth; divided by 10 at 18/24 and at 22/24 of the iterations."""
  part = min(1.0, i / args.warmup) if args.warmup else 1.0
  steps = sum(24 * i >= n * args.iterations for n in (18, 22))
  return args.lr * 0.1**steps * (0.001 + 0.999 * part)


def step(model, optimizer, batch, rate: float, seed: tuple[int, int], place) -> dict[str, Any]:
  """One step of SGD; returns the losses by name."""
  # All draws of an iteration, such as the sizes and the regions, depend on its number only, so that a training resumes
  # exactly.
  draws = np.random.SeedSequence([*seed, place.rank]).generate_state(1, np.uint64)[0]
  torch.manual_seed(int(draws >> np.uint64(1)))
  for group in optimizer.param_groups:
    group['lr'] = rate
  losses = model(*on_device(batch, place.device))
  optimizer.zero_grad()
  sum(losses.values()).backward()
  optimizer.step()
  return {name: x.detach() for name, x in losses.items()}


def on_device(batch, device) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
  """Images [3, h, w] in [0, 1] and their targets."""
  images, targets = [], []
  for item in batch:
    if isinstance(item, Problem):
      raise item
    image = torch.from_numpy(item['image']).to(device)
    images.append(image.permute(2, 0, 1).float() / 255)
    targets.append({k: torch.from_numpy(item[k]).to(device) for k in ('boxes', 'labels')})
  return images, targets


def loader(images, args, seed: int, first: int, last: int, place) -> torch.utils.data.DataLoader:
  """The batches of the iterations from `first` to before `last`, the part of this process."""
  keys = order(len(images), args.batch, seed, first, last)
  return decoded(images, (batch[place.rank :: place.world] for batch in keys), args)


def decoded(images, keys, args) -> torch.utils.data.DataLoader:
  """Batches of images, decoded by worker processes; keys: lists of keys of `images`."""
  return torch.utils.data.DataLoader(
    images, batch_sampler=keys, num_workers=args.workers, collate_fn=list, worker_init_fn=ignore_signals
  )  # fmt: skip


def order(n: int, batch: int, seed: int, first: int, last: int) -> Iterator[list[tuple[int, bool]]]:
  """(index, flip) of the images of each iteration: permutations of all n images, one after the other."""

  @functools.lru_cache(maxsize=2)
  def permutation(epoch):
    return np.random.default_rng([seed, 0, epoch]).permutation(n)

  for i in range(first, last):
    flips = np.random.default_rng([seed, 1, i]).random(batch) < 0.5
    places = (divmod(i * batch + j, n) for j in range(batch))
    yield [(int(permutation(epoch)[k]), bool(flip)) for (epoch, k), flip in zip(places, flips)]


def report(done, args, losses, total, seconds, place) -> str:
  """A line about an iteration; losses are those of the first process."""
  parts = ', '.join(f'{name.removeprefix("loss_")} {float(x):.3f}' for name, x in losses.items())
  memory = f', {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB' if place.device.type == 'cuda' else ''  # fmt: skip
  rest = (args.iterations - done) * seconds / 60
  return (
    f'iteration {done:,} of {args.iterations:,}: loss {total:.3f} ({parts}), learning rate '
    f'{learning_rate(done - 1, args):.2g}, {seconds:.2f} s per iteration, {rest:.0f} minutes left{memory}'
  )


# Evaluation.


@torch.no_grad()
def precise_bn(model, args, images, seed: int, place) -> bool:
  """Statistics of BatchNorm: the mean over batches, with the final weights; False after a signal.

  Running averages are those of weights that still changed (Wu and Johnson 2021; PRECISE_BN of detectron2).
  """
  norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
  momentum = [m.momentum for m in norms]
  for m in norms:
    m.reset_running_stats()
    m.momentum = None  # the mean over all batches
  model.train()
  last = args.iterations + args.precise_bn
  for batch in loader(images, args, seed, args.iterations, last, place):
    model(*on_device(batch, place.device))
    if place.any(stopping)[0]:
      return False
  for m, value in zip(norms, momentum):
    m.momentum = value
  return True


@torch.no_grad()
def detect(model, images, args, place) -> list[dict[str, np.ndarray]] | None:
  """The detections in each image, see `average_precision.evaluate`; None after a signal."""
  model.eval()
  for x in model.buffers() if place.world > 1 else ():  # without SyncBatchNorm they differ
    dist.broadcast(x, 0)
  own = range(place.rank, len(images), place.world)
  found = {}
  for i, batch in zip(own, decoded(images, ([(i, False)] for i in own), args)):
    if stopping:
      return None
    (result,) = model(on_device(batch, place.device)[0])
    found[i] = {name: x.cpu().numpy() for name, x in result.items()}
    if i % 500 < place.world:
      place.say(f'detects objects: image {i + 1:,} of {len(images):,}')
  parts = [found]
  if place.world > 1:
    parts = [{} for _ in range(place.world)]
    dist.all_gather_object(parts, found)
  merged = {i: result for part in parts for i, result in part.items()}
  return [merged[i] for i in range(len(images))]


def summarize(results, settings, place) -> dict[str, Any]:
  """Mean and standard deviation over the seeds; prints them."""
  summary = {}
  for name in ('AP', 'AP50', 'AP75'):
    values = [result[name] for result in results]
    deviation = statistics.stdev(values) if len(values) > 1 else None
    summary[name] = {'mean': statistics.fmean(values), 'std': deviation, 'values': values}
    spread = f' +- {deviation:.2f}' if len(values) > 1 else ''
    place.say(f'{name} {summary[name]["mean"]:.2f}{spread}')
  place.say(f'metric {settings["metric"]}, {settings["test_images"]:,} test images, {len(values)} seeds')  # fmt: skip
  versions = {'torch': torch.__version__, 'torchvision': torchvision.__version__}
  return {
    **summary, 'metric': settings['metric'], 'test_images': settings['test_images'], 'seeds': len(results),
    'settings': settings, 'versions': versions, 'hardware': f'{place.world} x {hardware(place)}',
  }  # fmt: skip


def hardware(place) -> str:
  """The name of the device."""
  return torch.cuda.get_device_name() if place.device.type == 'cuda' else 'CPU'


# Files and signals.


def write(path: pathlib.Path, fill: Callable[[BinaryIO], Any]) -> None:
  """Writes a file that is complete or not there; `fill` writes the content."""
  temporary = path.with_name(f'.{path.name}.partial')
  with temporary.open('wb') as file:
    fill(file)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file."""
  write(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def resume(path: pathlib.Path, model, optimizer, settings: dict[str, Any]) -> int:
  """Loads a checkpoint; returns the number of iterations that are done, 0 without a checkpoint."""
  if not path.exists():
    return 0
  try:
    state = torch.load(path, map_location='cpu', weights_only=True)
    check_settings(path, json.loads(state['settings']), settings)
    model.load_state_dict(state['model'])
    optimizer.load_state_dict(state['optimizer'])
    return int(state['iteration'])
  except Problem:
    raise
  except Exception:  # the reader raises many types
    raise Problem(f'{path} is damaged: delete it to start again') from None


def finished(path: pathlib.Path, settings: dict[str, Any]) -> dict[str, Any] | None:
  """The result of a seed; None if there is none."""
  if not path.exists():
    return None
  try:
    result = json.loads(path.read_text())
    numbers = [float(result[name]) for name in ('AP', 'AP50', 'AP75')]
    own = dict(result['settings'])
  except (ValueError, KeyError, TypeError):
    raise Problem(f'{path} is damaged: delete it to evaluate again') from None
  own.pop('seed', None)
  check_settings(path, own, settings)
  assert len(numbers) == 3
  return result


def check_settings(path, own: dict[str, Any], settings: dict[str, Any]) -> None:
  """Raises Problem if a file is from a training with other settings."""
  settings = json.loads(json.dumps(settings))
  for name, value in settings.items():
    if own.get(name) != value:
      raise Problem(f'{path} is from a training with {name} {own.get(name)} instead of {value}: choose another --out')  # fmt: skip


def stop(*_) -> None:
  """Handles a signal: the training saves its state after the current iteration."""
  global stopping
  stopping = True


def ignore_signals(_) -> None:
  """In worker processes, which end with their parent."""
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)


def printable(text: str) -> str:
  """Text in one line of visible characters."""
  return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


if __name__ == '__main__':
  sys.exit(main())
