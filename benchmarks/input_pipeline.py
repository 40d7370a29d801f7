"""Throughput of the input pipeline, against bare decoding and against all of SimCLR's augmentation on the host.

    python benchmarks/input_pipeline.py [--data=DIR] [--rounds=5]    # DIR: a folder of photographs
    python benchmarks/input_pipeline.py --data=DIR --memory
    python benchmarks/input_pipeline.py --device
    python benchmarks/input_pipeline.py --augmentation [--topology=v5e:2x2]

Prints images/s on all cores for two views of 224 pixels, and the memory of the host process. The pipelines run
alternately, so that a busy machine slows all; CPU time excludes other programs:
  a   JPEG decoding alone, by tf.data
  b   this project: decoded once, the region of the views is cropped and augmented on the device
  b'  the same, with the two views resized on the host: data.resize_on=host
  b"  as b, with MoCo v2's views
  c   all of SimCLR v2's augmentation on the host, in tf.data, as its released code does
  d   the same with torchvision in a torch DataLoader; with Pillow if torchvision is not installed
Targets: b/a at least 0.85, b/c at least 4, b'/b at least 0.5.

--memory: memory of the host process over 10,000 batches. --device: training steps/s with images that are kept in device
memory, and with the same images streamed. --augmentation: FLOPs and bytes of the views and of an entire ResNet-50
step, as counted by the compiler; target: below 10 %. It compiles for the CPU or, in ten minutes and with libtpu, ahead
of time for a TPU: JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1.
"""

import argparse
import multiprocessing
import os
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from simclr_jax import config, data, methods, optim, sharding, train_state
from simclr_jax.data import augment, dataset as datasets, loader

# TensorFlow and torch are imported where they are used, since one process cannot load both.

SIZE, BATCH = 224, 128
SIMCLR, MOCO = ('simclr_v2', 'simclr_v2'), ('moco_v2', 'moco_v2')
CORES = len(os.sched_getaffinity(0))


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument(
    '--data', help='a folder of photographs (default: the two of scikit-learn, often)'
  )
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--slow-images', type=int, default=256, help='images per round, for c and d')
  parser.add_argument(
    '--only', choices=('torchvision', 'pillow'), help='run d only; used internally'
  )
  parser.add_argument('--memory', action='store_true')
  parser.add_argument('--batches', type=int, default=10_000, help='for --memory')
  parser.add_argument('--device', action='store_true')
  parser.add_argument('--augmentation', action='store_true')
  parser.add_argument('--topology', help='a TPU topology to compile for (one of its devices)')
  args = parser.parse_args()
  if args.augmentation:
    return augmentation(args.topology)
  if args.device:
    return device(args.rounds)
  if args.only:
    return per_image(args.only, args.data, args.slow_images)
  if args.memory:
    if not args.data:
      parser.error('--memory needs --data')
    return memory(args.data, args.batches)
  if not args.data:
    with tempfile.TemporaryDirectory() as folder:
      write_photographs(folder)
      return throughput(folder, args.rounds, args.slow_images)
  return throughput(args.data, args.rounds, args.slow_images)


def write_photographs(folder, count=512):
  """Writes scikit-learn's two photographs in many sizes."""
  import sklearn.datasets
  from PIL import Image

  images = [Image.fromarray(pixels) for pixels in sklearn.datasets.load_sample_images().images]
  for i in range(count):
    images[i % 2].resize((400 + i % 134, 400)).save(f'{folder}/{i:03d}.jpg')


def settings(folder, **fields):
  """The `data` part of a recipe that reads the images in a folder."""
  fields = {'source': 'folder', 'dir': folder, 'train_split': '.', 'name': '', **fields}
  return config.load('simclr_imagenet', {f'data.{k}': v for k, v in fields.items()}).data


# Images/s.


def throughput(folder, rounds, slow_images):
  """Prints the images/s of all pipelines."""
  files = load(folder)
  few = files.sample(slow_images)
  passes: dict[str, tuple[int, Callable]] = {  # number of images, one pass over them
    'b   simclr_jax': (len(files), consumer(ours(files, SIMCLR))),
    'a   decoding alone': (len(files), consumer(decoding(files))),
    "b'  resize_on=host": (len(files), consumer(ours(load(folder, resize_on='host'), SIMCLR))),
    'b"  MoCo v2': (len(files), consumer(ours(files, MOCO))),
    'c   all on the host': (len(few), consumer(classical(few))),
  }
  child, name = start_child(folder, slow_images)
  passes[f'd   {name}'] = len(few), lambda: pass_of_child(child)

  before = peak_memory()
  seconds: dict[str, list[float]] = {k: [] for k in passes}
  cpu: dict[str, list[float]] = {k: [] for k in passes}
  for i in range(rounds + 1):
    for name, (_, one_pass) in passes.items():
      wall, work = one_pass()
      if i:  # the first round fills the page cache and compiles
        seconds[name].append(wall)
        cpu[name].append(work)
      elif name.startswith('b '):
        after = peak_memory()
  child.stdin.close()

  print(f'{CORES} cores, {len(files):,} files, {len(few)} for c and d; median of {rounds} rounds\n')
  print(f'{"":26} {"images/s":>8} {"per core":>8} {"CPU ms/image":>16}')
  for name in sorted(passes, key=lambda name: name[0]):
    count = passes[name][0]
    rate, work = count / np.median(seconds[name]), 1000 * np.median(cpu[name]) / count
    print(f'{name:26} {rate:8.0f} {rate / CORES:8.0f} {work:16.2f}')
  print(f'\n{"":6}     ratio       lowest, highest     by CPU time')
  mine, *others = passes
  for other in others:
    scale = passes[mine][0] / passes[other][0]
    ratio = scale * np.array(seconds[other]) / seconds[mine]
    by_cpu = scale * np.median(cpu[other]) / np.median(cpu[mine])
    target = {
      'a ': '   target: at least 0.85',
      'c ': '   target: at least 4',
      "b'": '   target: at most 2',
    }.get(other[:2], '')
    print(
      f'b / {other[:2]} {np.median(ratio):10.2f} {ratio.min():12.2f} {ratio.max():8.2f} '
      f'{by_cpu:15.2f}{target}'
    )
  print(f'\nhost memory: peak RSS {after:.0f} MiB after a pass of b, {before:.0f} before it')


def load(folder, **fields) -> Any:
  """The photographs in a folder, a stream of encoded files."""
  return data.load(settings(folder, **fields), 'train')


def consumer(dataset):
  """A function that reads a tf.data pipeline once, and returns its wall-clock and CPU seconds."""

  def one_pass():
    wall, work = time.perf_counter(), time.process_time()
    for _ in dataset.as_numpy_iterator():
      pass
    return time.perf_counter() - wall, time.process_time() - work

  return one_pass


def peak_memory():
  """The peak RSS of the process in MiB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def decoding(files):
  """Reading and decoding only: the elements are shapes."""
  from simclr_jax.data.stream import tf, threads, with_threads

  paths = tf.data.Dataset.from_tensor_slices([files.name(i) for i in range(len(files))])

  def decode(path):
    return tf.shape(tf.io.decode_jpeg(tf.io.read_file(path), channels=3))

  shapes = paths.map(decode, threads(files.settings))
  return with_threads(shapes.batch(BATCH).prefetch(1), files.settings)


def ours(files, pipelines):
  """The pipeline of `loader.for_training`, but a single pass, without prefetching for the next one."""
  from simclr_jax.data import decode, stream

  encoded = files.train_iterator(0, BATCH, 0, np.arange(BATCH)).take(len(files))
  canvases = decode.canvases(encoded, pipelines, SIZE, 0, files.settings)
  return stream.with_threads(canvases.batch(BATCH).prefetch(1), files.settings)


def classical(files):
  """Both views on the host, as defined in SimCLR's released code."""
  from simclr_jax.data.stream import tf, threads, with_threads

  uniform = tf.random.stateless_uniform

  def maybe(p, seed, change, image):
    return tf.cond(uniform([], seed) < p, lambda: change(image), lambda: image)

  def cut(image, seed):
    begin, length, _ = tf.image.stateless_sample_distorted_bounding_box(
      tf.shape(image), tf.zeros([1, 0, 4]), seed, 0.1, (3 / 4, 4 / 3), (0.08, 1.0), 100, True
    )
    image = tf.slice(image, begin, length)
    return tf.image.resize(tf.image.convert_image_dtype(image, tf.float32), [SIZE] * 2, 'bicubic')

  def jitter(image, seeds):
    brightness, contrast, saturation = (uniform([], seeds[i], 0.2, 1.8) for i in range(3))
    turns = uniform([], seeds[3], -0.2, 0.2)
    order = tf.random.experimental.stateless_shuffle(tf.range(4), seeds[4])
    for i in range(4):
      changes = [
        lambda x=image: x * brightness,
        lambda x=image: tf.image.adjust_contrast(x, contrast),
        lambda x=image: tf.image.adjust_saturation(x, saturation),
        lambda x=image: tf.image.adjust_hue(x, turns),
      ]
      image = tf.clip_by_value(tf.switch_case(order[i], changes), 0.0, 1.0)
    return image

  def blur(image, seed):
    radius = SIZE // 10 // 2
    x = tf.range(-radius, radius + 1, dtype=tf.float32)
    weights = tf.nn.softmax(-(x**2) / (2 * uniform([], seed, 0.1, 2.0) ** 2))
    rows = tf.tile(weights[:, None, None, None], [1, 1, 3, 1])
    image = image[None]
    for kernel in (rows, tf.transpose(rows, [1, 0, 2, 3])):
      image = tf.nn.depthwise_conv2d(image, kernel, [1, 1, 1, 1], 'SAME')
    return image[0]

  def view(image, seed):
    s = tf.unstack(tf.random.split(seed, 11))
    image = cut(image, s[0])
    image = maybe(0.5, s[1], lambda x: x[:, ::-1], image)
    image = maybe(0.8, s[2], lambda x: jitter(x, s[3:8]), image)
    gray = lambda x: tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(x))  # noqa: E731
    image = maybe(0.2, s[8], gray, image)
    image = maybe(0.5, s[9], lambda x: blur(x, s[10]), image)
    return tf.ensure_shape(tf.clip_by_value(image, 0.0, 1.0), [SIZE, SIZE, 3])

  def views(i, path):
    image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
    return tf.stack([view(image, tf.stack([i, v])) for v in range(2)])

  paths = tf.data.Dataset.from_tensor_slices([files.name(i) for i in range(len(files))])
  dataset = paths.enumerate().map(
    lambda i, path: views(tf.cast(i, tf.int32), path), threads(files.settings)
  )
  return with_threads(dataset.batch(BATCH).prefetch(1), files.settings)


# d, in a process of its own.


def start_child(folder, count):
  """The process that runs d, ready for `pass_of_child`, and the name of the library that it uses."""
  for library in ('torchvision', 'pillow'):
    command = [sys.executable, __file__, f'--only={library}', f'--data={folder}']
    child = subprocess.Popen(
      [*command, f'--slow-images={count}'],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout
    if name := child.stdout.readline().strip():
      return child, name
  raise SystemExit('neither torchvision nor Pillow is installed')


def pass_of_child(child):
  """One pass in the child process; returns as of `consumer`."""
  print(file=child.stdin, flush=True)
  return tuple(float(x) for x in child.stdout.readline().split())


def per_image(library, folder, count):
  """One pass for each line of the standard input; prints its wall-clock and CPU seconds."""
  paths = sorted(str(p) for p in pathlib.Path(folder).rglob('*.jp*g'))
  paths = [paths[i] for i in datasets.choose(count, len(paths))]
  if library == 'torchvision':
    try:
      import torch
      import torchvision
    except ImportError:
      return
    torch_loader = torch.utils.data.DataLoader(
      TorchvisionViews(paths), BATCH, num_workers=CORES, persistent_workers=True,
      multiprocessing_context='spawn',
    )  # fmt: skip
    print(f'torchvision {torchvision.__version__}', flush=True)
  else:
    pool = multiprocessing.get_context('spawn').Pool(CORES)
    print('Pillow', flush=True)

  def cpu_ticks():  # of this process and its workers
    pids = [os.getpid(), *(p.pid for p in multiprocessing.active_children())]
    stats = [pathlib.Path(f'/proc/{pid}/stat').read_text().split(') ')[-1] for pid in pids]
    return sum(int(ticks) for stat in stats for ticks in stat.split()[11:13])

  for _ in sys.stdin:
    wall, work = time.perf_counter(), cpu_ticks()
    for _ in torch_loader if library == 'torchvision' else pool.imap(pillow_views, paths, 8):
      pass
    print(time.perf_counter() - wall, (cpu_ticks() - work) / os.sysconf('SC_CLK_TCK'), flush=True)


class TorchvisionViews:
  """A torch data set of two views of each file."""

  def __init__(self, paths):
    self.paths = paths

  def __len__(self):
    return len(self.paths)

  def __getitem__(self, i):
    import torch
    from PIL import Image
    from torchvision.transforms import v2 as t

    if not hasattr(self, 'view'):  # once per worker
      self.view = t.Compose([
        t.RandomResizedCrop(SIZE, interpolation=t.InterpolationMode.BICUBIC),
        t.RandomHorizontalFlip(),
        t.RandomApply([t.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
        t.RandomGrayscale(0.2),
        t.RandomApply([t.GaussianBlur(SIZE // 10 | 1, (0.1, 2.0))], 0.5),
        t.ToImage(),
        t.ToDtype(torch.float32, scale=True),
      ])  # fmt: skip
    image = Image.open(self.paths[i]).convert('RGB')
    return torch.stack([self.view(image), self.view(image)])


def pillow_views(path):
  """Two views of a file with Pillow alone, a little simpler than torchvision's."""
  from PIL import Image, ImageEnhance, ImageFilter

  source = Image.open(path).convert('RGB')

  def change_hue(image, factor):
    h, s, v = image.convert('HSV').split()
    h = h.point([(i + round(256 * (factor - 1) / 4)) % 256 for i in range(256)])
    return Image.merge('HSV', (h, s, v)).convert('RGB')

  def view():
    scale = random.uniform(0.08, 1) ** 0.5
    aspect = random.uniform(3 / 4, 4 / 3) ** 0.5
    w, h = source.width * min(scale * aspect, 1), source.height * min(scale / aspect, 1)
    x, y = random.uniform(0, source.width - w), random.uniform(0, source.height - h)
    image = source.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (x, y, x + w, y + h))
    if random.random() < 0.5:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if random.random() < 0.8:
      changes: list[Any] = [
        ImageEnhance.Brightness,
        ImageEnhance.Contrast,
        ImageEnhance.Color,
        change_hue,
      ]
      for change in random.sample(changes, 4):
        factor = random.uniform(0.2, 1.8)
        image = change_hue(image, factor) if change is change_hue else change(image).enhance(factor)
    if random.random() < 0.2:
      image = image.convert('L').convert('RGB')
    if random.random() < 0.5:
      image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))
    return np.asarray(image, np.float32) / 255

  return np.stack([view(), view()])


# Memory.


def memory(folder, batches, batch=16, size=32):
  """Streams many batches of small images of many sizes to the device; prints the RSS during the run."""
  from PIL import Image

  with tempfile.TemporaryDirectory() as small:
    files = load(folder).sample(1000)
    for i in range(len(files)):
      image = Image.open(files.name(i))
      image.thumbnail((40 + i % 100, 40 + i % 100))  # some larger than the canvas
      image.convert('RGB').save(f'{small}/{i}.jpg')
    mesh = sharding.make_mesh(jax.devices()[:1])
    images = load(small, on_device='no')
    batch_at = loader.for_training(images, 0, batch, SIMCLR, size, mesh)
    print(f'batches of {batch}, views of {size} pixels\nbatches  RSS MiB   batches/s')
    start, sizes = time.perf_counter(), []
    for i in range(batches + 1):
      if i and i % (batches // 10) == 0:
        sizes.append(rss())
        rate = batches // 10 / (time.perf_counter() - start)
        print(f'{i:7,} {sizes[-1]:8.1f} {rate:11.0f}', flush=True)
        start = time.perf_counter()
      batch_at(i)
    batch_at.close()
    print(f'growth from batch {batches // 10:,} on: {sizes[-1] - sizes[0]:.1f} MiB')


def rss():
  """The current RSS of the process in MiB."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * resource.getpagesize() / 2**20


# Kept on the device or streamed.

WARM_UP = loader.PREFETCH + 2


def device(rounds, steps=5):
  """Prints steps/s of a small network on 2,000 JPEG files of 32x32, both ways."""
  from PIL import Image

  images = np.random.default_rng(0).integers(0, 256, (2000, 4, 4, 3), np.uint8)
  with tempfile.TemporaryDirectory() as folder:
    for i, image in enumerate(images):
      Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC).save(f'{folder}/{i}.jpg')
    runs = [SteppedRun(folder, on_device) for on_device in ('yes', 'no')]
    for i in range(rounds + 1):
      for run in runs:
        seconds = run.time(steps)
        if i:  # the first round compiles
          run.seconds.append(seconds)
    for run in runs:
      run.step.loader.close()
  kept, streamed = (np.array(run.seconds) for run in runs)
  print(f'kept on the device   {1 / np.median(kept):6.2f} steps/s')
  print(f'streamed             {1 / np.median(streamed):6.2f} steps/s')
  ratio = streamed / kept
  print(f'ratio {np.median(ratio):.2f}, {ratio.min():.2f} to {ratio.max():.2f}')


class SteppedRun:
  """A training whose steps are timed now and then."""

  def __init__(self, folder, on_device):
    recipe = config.load(
      'simclr_digits',
      {
        'data.source': 'folder', 'data.dir': folder, 'data.train_split': '.',
        'data.num_classes': '0', 'data.on_device': on_device,
        'model.width_multiplier': '0.125', 'batch_size': '128',
      },
    )  # fmt: skip
    self.step: Any
    self.state, self.step = train_state.build(recipe, data.load(recipe.data, 'train'))
    self.done = 0
    self.seconds: list[float] = []

  def time(self, steps):
    """Seconds per step, after a warm-up that uses up the batches which were prefetched in the meantime."""
    for i in range(WARM_UP + steps):
      if i == WARM_UP:
        jax.block_until_ready(self.state)
        start = time.perf_counter()
      self.state, _ = self.step(self.state, self.done + i)
    jax.block_until_ready(self.state)
    self.done += WARM_UP + steps
    return (time.perf_counter() - start) / steps


# Cost of the augmentation within a step.


def augmentation(topology):
  """Prints FLOPs and bytes of one ResNet-50 step of 128 images on one device, and of the views in it.

  Bytes are those that the fusions of the compiled program read and write; on a TPU they include memory on the chip, in
  which the loop of the jitter runs. Before compilation every op counts as if it read and wrote memory; this is
  printed for the CPU, for comparison.
  """
  devices: list[Any]
  if topology:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices[:1]
  else:
    devices = jax.devices('cpu')[:1]
  mesh = sharding.make_mesh(devices)
  place = NamedSharding(mesh, PartitionSpec())

  def cost(function, *args):
    """GFLOP and GB: compiled and, on the CPU, before compilation."""
    lowered = jax.jit(function, in_shardings=place, out_shardings=place).lower(*args)
    stages: list[Any] = [lowered.compile()] if topology else [lowered.compile(), lowered]
    analyses = [stage.cost_analysis() for stage in stages]
    return np.array([[c['flops'], c['bytes accessed']] for c in analyses]) / 1e9

  def show(name, values, unit=''):
    print(f'{name:34}' + ''.join(f'{x:8.1f}{unit:2}' for x in values.ravel()), flush=True)

  recipe = config.load(
    'simclr_imagenet',
    # bfloat16 is 'auto' on a TPU.
    {'batch_size': str(BATCH), 'augment.view1': SIMCLR[0], 'dtype': 'bfloat16'},
  )
  recipe = config.with_examples(recipe, 1_281_167)
  _, rows = loader.shapes(recipe.data.examples, BATCH, 2, SIZE, 'device')

  def views(pipeline):
    def draw(rows):
      return augment.views(
        rows['images'], rows['epoch'], rows['position'], (pipeline,) * 2, 0, SIZE, rows['crops']
      )

    return cost(draw, rows)

  print(f'{BATCH} images, two views, one {devices[0].device_kind}\n')
  print(f'{"":34}   GFLOP        GB' + ('' if topology else '   before compilation'))
  ops = augment.PIPELINES[SIMCLR[0]].split(' | ')
  total = products = np.zeros((1 if topology else 2, 2))
  for i, op in enumerate(ops):
    so_far = views(' | '.join(ops[: i + 1]))
    show(op, so_far - total)
    products = products + (so_far - total) * op.startswith(('simclr_crop', 'simclr_blur'))
    total = so_far
  # The analyses count the body of a loop once, and the jitter is a loop of four iterations.
  with mock.patch('jax.lax.scan', lambda body, image, _: (image + 1, None)):
    iterations = 3 * (total - views(SIMCLR[0]))
  show('3 more iterations of the jitter', iterations)
  show('views', total + iterations)

  method = methods.build(recipe)
  rate = optim.schedule(recipe, recipe.data.examples)
  optimizer = optim.build(recipe, rate, method.optimizer_groups)

  def step(state, seed, rows):
    return train_state.train_step(
      method, optimizer, rate, recipe, state, seed=seed, teacher=None, constants={}, rows=rows
    )

  state = jax.eval_shape(lambda: train_state.create(method, optimizer, 0, SIZE))
  with jax.set_mesh(mesh):
    entire = cost(step, state, jax.ShapeDtypeStruct((), jnp.uint32), rows)
  show('entire step', entire + iterations)
  share = 100 * (total + iterations) / (entire + iterations)
  show('views / step; target: below 10 %', share, ' %')
  # Crop and blur are matrix products of the highest precision: six passes on a TPU.
  in_views, in_step = (x[0, 0] + iterations[0, 0] + 5 * products[0, 0] for x in (total, entire))
  print(f"GFLOP with a TPU's six passes {100 * in_views / in_step:12.1f} %")


if __name__ == '__main__':
  main()
