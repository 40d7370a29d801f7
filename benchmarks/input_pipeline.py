"""How fast images become batches, against bare decoding and against all of SimCLR's views on the host.

    python benchmarks/input_pipeline.py --data=DIR [--rounds=5]    # DIR: a folder of photographs
    python benchmarks/input_pipeline.py --data=DIR --memory
    python benchmarks/input_pipeline.py --device
    python benchmarks/input_pipeline.py --augmentation [--topology=v5e:2x2]

Prints images/s on all cores for two views of 224 pixels, and what the host needs in memory. All take
turns, so that a busy machine slows all; CPU time does not see what other programs take away:
  a   JPEG decoding alone, by tf.data
  b   this project's input: decoded once, the window that the views need, cut and augmented on the device
  b'  the same, the two views resized on the host: data.resize_on=host
  b"  as b, with MoCo v2's views
  c   all of SimCLR v2's augmentation on the host, in tf.data, as its released code does
  d   the same by torchvision in a torch DataLoader; by Pillow where torchvision is missing
Targets: b/a at least 0.6, b/c at least 4.

--memory: the host's memory while 10,000 batches go by. --device: training steps/s with images that are
kept on the device, and with the same images streamed. --augmentation: FLOPs and bytes of the views and
of a whole ResNet-50 step, as the compiler counts them; target: below 10 %. It compiles for the CPU, or
in ten minutes for a TPU that is not there, by jax[tpu] with JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1.
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
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from simclr_jax import config, data, methods, optim, sharding, train_state
from simclr_jax.data import augment, crop, loader

# TensorFlow and torch are imported where they are used: one process cannot hold both.

SIZE, BATCH = 224, 128
SIMCLR, MOCO = ('simclr_v2', 'simclr_v2'), ('moco_v2', 'moco_v2')
CORES = len(os.sched_getaffinity(0))


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--data', help='a folder of photographs')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--slow-images', type=int, default=256, help='a round, for c and d')
  parser.add_argument('--only', choices=('torchvision', 'pillow'), help='d alone; used internally')
  parser.add_argument('--memory', action='store_true')
  parser.add_argument('--batches', type=int, default=10_000, help='of --memory')
  parser.add_argument('--device', action='store_true')
  parser.add_argument('--augmentation', action='store_true')
  parser.add_argument('--topology', help='of TPUs, one of which to compile for')
  args = parser.parse_args()
  if args.augmentation:
    return augmentation(args.topology)
  if args.device:
    return device(args.rounds)
  if not args.data:
    parser.error('--data is missing')
  if args.only:
    return per_image(args.only, args.data, args.slow_images)
  if args.memory:
    return memory(args.data, args.batches)
  return throughput(args.data, args.rounds, args.slow_images)


def settings(folder, **fields):
  """The `data` part of a recipe for the images in a folder."""
  fields = {'source': 'folder', 'dir': folder, 'train_split': '.', 'name': '', **fields}
  return config.load('simclr_imagenet', {f'data.{k}': v for k, v in fields.items()}).data


# Images a second.


def throughput(folder, rounds, slow):
  files = data.load(settings(folder), 'train')
  resized = data.load(settings(folder, resize_on='host'), 'train')
  few = files.sample(slow)
  passes = {  # one pass over some of the files
    'b   simclr_jax': (len(files), consumer(ours(files, SIMCLR))),
    'a   decoding alone': (len(files), consumer(decoding(files))),
    "b'  resize_on=host": (len(files), consumer(ours(resized, SIMCLR))),
    'b"  MoCo v2': (len(files), consumer(ours(files, MOCO))),
    'c   all on the host': (len(few), consumer(classical(few))),
  }
  child, name = start_child(folder, slow)
  passes[f'd   {name}'] = len(few), lambda: ask(child)

  before = peak()
  seconds, cpu = {k: [] for k in passes}, {k: [] for k in passes}
  for i in range(rounds + 1):
    for name, (_, one_pass) in passes.items():
      wall, work = one_pass()
      if i:  # the first round fills the page cache and compiles
        seconds[name].append(wall)
        cpu[name].append(work)
      elif name.startswith('b '):
        after = peak()
  child.stdin.close()

  print(f'{CORES} cores, {len(files):,} files, {len(few)} for c and d; median of {rounds} rounds\n')
  print(f'{"":26} images/s   a core  CPU ms an image')
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
    target = {'a': '   target: at least 0.6', 'c': '   target: at least 4'}.get(other[0], '')
    print(
      f'b / {other[:2]} {np.median(ratio):10.2f} {ratio.min():12.2f} {ratio.max():8.2f} '
      f'{by_cpu:15.2f}{target}'
    )
  print(f'\nhost memory: peak RSS {after:.0f} MiB after a pass of b, {before:.0f} before it')


def consumer(dataset):
  """A function that does one pass: its seconds, and those of all cores together."""

  def one_pass():
    wall, work = time.perf_counter(), time.process_time()
    for _ in dataset.as_numpy_iterator():
      pass
    return time.perf_counter() - wall, time.process_time() - work

  return one_pass


def peak():
  """MiB that the process had in memory at most."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def decoding(files):
  """Nothing but read and decoded: of an image only its shape is kept."""
  from simclr_jax.data.stream import tf, threads, with_threads

  paths = tf.data.Dataset.from_tensor_slices([files.name(i) for i in range(len(files))])

  def decode(path):
    return tf.shape(tf.io.decode_jpeg(tf.io.read_file(path), channels=3))

  shapes = paths.map(decode, threads(files.settings))
  return with_threads(shapes.batch(BATCH).prefetch(1), files.settings)


def ours(files, pipelines):
  """As `loader.for_training` builds it, but a single pass: nothing is read ahead for the next one."""
  from simclr_jax.data import decode, stream

  encoded = files.examples(0, BATCH, 0, np.arange(BATCH)).take(len(files))
  canvases = decode.canvases(encoded, pipelines, SIZE, 0, files.settings)
  return stream.with_threads(canvases.batch(BATCH).prefetch(1), files.settings)


def classical(files):
  """Both views wholly on the host, with the definitions of SimCLR's released code."""
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
  """The process that does d, ready for `ask`, and the name of what it uses."""
  for library in ('torchvision', 'pillow'):
    command = [sys.executable, __file__, f'--only={library}', f'--data={folder}']
    child = subprocess.Popen(
      [*command, f'--slow-images={count}'],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    if name := child.stdout.readline().strip():
      return child, name
  raise SystemExit('neither torchvision nor Pillow can be imported')


def ask(child):
  """Lets the child do one pass, as `consumer`."""
  print(file=child.stdin, flush=True)
  return tuple(float(x) for x in child.stdout.readline().split())


def per_image(library, folder, count):
  """A pass for each line of the standard input; prints what `consumer` returns."""
  paths = sorted(str(p) for p in pathlib.Path(folder).rglob('*.jp*g'))
  paths = [paths[i] for i in data.choose(count, len(paths))]
  if library == 'torchvision':
    try:
      import torch
      import torchvision
    except ImportError:
      return
    loader = torch.utils.data.DataLoader(
      ByTorchvision(paths), BATCH, num_workers=CORES, persistent_workers=True,
      multiprocessing_context='spawn',
    )  # fmt: skip
    print(f'torchvision {torchvision.__version__}', flush=True)
  else:
    pool = multiprocessing.get_context('spawn').Pool(CORES)
    print('Pillow', flush=True)

  def ticks():  # that this process and its workers have had
    pids = [os.getpid(), *(p.pid for p in multiprocessing.active_children())]
    stats = [pathlib.Path(f'/proc/{pid}/stat').read_text().split(') ')[-1] for pid in pids]
    return sum(int(ticks) for stat in stats for ticks in stat.split()[11:13])

  for _ in sys.stdin:
    wall, work = time.perf_counter(), ticks()
    for _ in loader if library == 'torchvision' else pool.imap(by_pillow, paths, 8):
      pass
    print(time.perf_counter() - wall, (ticks() - work) / os.sysconf('SC_CLK_TCK'), flush=True)


class ByTorchvision:
  """A data set for torch's DataLoader."""

  def __init__(self, paths):
    self.paths = paths

  def __len__(self):
    return len(self.paths)

  def __getitem__(self, i):
    import torch
    from PIL import Image
    from torchvision.transforms import v2 as t

    if not hasattr(self, 'view'):  # once a worker
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


def by_pillow(path):
  """Two views of a file by Pillow alone, a little simpler than torchvision's."""
  from PIL import Image, ImageEnhance, ImageFilter

  source = Image.open(path).convert('RGB')

  def turned(image, factor):
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
      changes = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color, turned]
      for change in random.sample(changes, 4):
        factor = random.uniform(0.2, 1.8)
        image = turned(image, factor) if change is turned else change(image).enhance(factor)
    if random.random() < 0.2:
      image = image.convert('L').convert('RGB')
    if random.random() < 0.5:
      image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))
    return np.asarray(image, np.float32) / 255

  return np.stack([view(), view()])


# Memory.


def memory(folder, batches, batch=16, size=32):
  """Streams many batches of small pictures of many sizes to the device; prints the RSS as it goes."""
  from PIL import Image

  with tempfile.TemporaryDirectory() as small:
    files = data.load(settings(folder), 'train').sample(1000)
    for i in range(len(files)):
      image = Image.open(files.name(i))
      image.thumbnail([40 + i % 100] * 2)  # some larger than the canvas
      image.convert('RGB').save(f'{small}/{i}.jpg')
    found = data.load(settings(small, on_device='no'), 'train')
    mesh = sharding.make_mesh(jax.devices()[:1])
    batch_at = loader.for_training(found, 0, batch, SIMCLR, size, mesh)
    print(f'batches of {batch}, views of {size} pixels\nbatches  RSS MiB   batches/s')
    start, seen = time.perf_counter(), []
    for i in range(batches + 1):
      if i and i % (batches // 10) == 0:
        seen.append(rss())
        rate = batches // 10 / (time.perf_counter() - start)
        print(f'{i:7,} {seen[-1]:8.1f} {rate:11.0f}', flush=True)
        start = time.perf_counter()
      batch_at(i)
    batch_at.close()
    print(f'growth from batch {batches // 10:,} on: {seen[-1] - seen[0]:.1f} MiB')


def rss():
  """MiB of the process in memory now."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * resource.getpagesize() / 2**20


# Kept on the device or streamed.

WARM = loader.AHEAD + 2


def device(rounds, steps=5):
  """Prints steps/s of a small network on 2,000 JPEG files of 32x32, both ways."""
  from PIL import Image

  images = np.random.default_rng(0).integers(0, 256, (2000, 4, 4, 3), np.uint8)
  with tempfile.TemporaryDirectory() as folder:
    for i, image in enumerate(images):
      Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC).save(f'{folder}/{i}.jpg')
    runs, seconds = {}, {}
    for name, where in {'kept on the device': 'yes', 'streamed': 'no'}.items():
      recipe = config.load(
        'simclr_digits',
        {
          'data.source': 'folder', 'data.dir': folder, 'data.train_split': '.',
          'data.num_classes': '0', 'data.on_device': where,
          'model.width_multiplier': '0.125', 'batch_size': '128',
        },
      )  # fmt: skip
      state, step = train_state.build(recipe, data.load(recipe.data, 'train'))
      runs[name], seconds[name] = [step, state, 0], []
    for i in range(rounds + 1):
      for name, run in runs.items():
        step, state, at = run
        for j in range(WARM + steps):
          if j == WARM:  # what was got ready while the other one had its turn is used up
            jax.block_until_ready(state)
            start = time.perf_counter()
          state, _ = step(state, at + j)
        jax.block_until_ready(state)
        if i:
          seconds[name].append((time.perf_counter() - start) / steps)
        run[1:] = state, at + WARM + steps
    for step, _, _ in runs.values():
      step.loader.close()
  for name, s in seconds.items():
    print(f'{name:20} {1 / np.median(s):6.2f} steps/s')
  kept, streamed = (np.array(s) for s in seconds.values())
  ratio = streamed / kept
  print(f'ratio {np.median(ratio):.2f}, {ratio.min():.2f} to {ratio.max():.2f}')


# What the augmentation costs within a step.


def augmentation(topology):
  """Prints FLOPs and bytes of one ResNet-50 step of 128 images on one device, and of the views in it.

  Bytes are those that the compiled program's fusions read and write, on a TPU also in memory on the chip,
  where the jitter's loop lives. Before compilation every op counts as if it read and wrote memory: printed
  for the CPU, for comparison.
  """
  if topology:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices[:1]
  else:
    devices = jax.devices('cpu')[:1]
  mesh = sharding.make_mesh(devices)
  place = NamedSharding(mesh, PartitionSpec())

  def cost(function, *args):
    """GFLOP and GB: compiled, and on the CPU before that."""
    lowered = jax.jit(function, in_shardings=place, out_shardings=place).lower(*args)
    found = [lowered.compile().cost_analysis()] + ([] if topology else [lowered.cost_analysis()])
    return np.array([[c['flops'], c['bytes accessed']] for c in found]) / 1e9

  def show(name, found, unit=''):
    print(f'{name:34}' + ''.join(f'{x:8.1f}{unit:2}' for x in found.ravel()), flush=True)

  # bfloat16 is what 'auto' is on a TPU.
  recipe = config.load(
    'simclr_imagenet',
    {'batch_size': str(BATCH), 'augment.view1': SIMCLR[0], 'dtype': 'bfloat16'},
  )
  recipe = config.with_examples(recipe, 1_281_167)
  number = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
  rows = {name: number for name in ('index', 'label', 'epoch', 'position')}
  rows['images'] = jax.ShapeDtypeStruct(
    (BATCH, *crop.canvas_shape(SIZE, 2, 'device'), 3), jnp.uint8
  )
  rows['crops'] = jax.ShapeDtypeStruct((BATCH, 2, 2, 4), jnp.float32)

  def views(pipeline):
    def of(r):
      return augment.views(
        r['images'], r['epoch'], r['position'], (pipeline,) * 2, 0, SIZE, r['crops']
      )

    return cost(of, rows)

  print(f'{BATCH} images, two views, one {devices[0].device_kind}\n')
  print(f'{"":34}   GFLOP        GB' + ('' if topology else '   before compiling'))
  ops = augment.PIPELINES[SIMCLR[0]].split(' | ')
  total, products = 0, 0
  for i, op in enumerate(ops):
    so_far = views(' | '.join(ops[: i + 1]))
    show(op, so_far - total)
    products += (so_far - total) * op.startswith(('simclr_crop', 'simclr_blur'))
    total = so_far
  # The analyses count the body of a loop once, and the jitter is a loop of four.
  with mock.patch('jax.lax.scan', lambda body, image, _: (image + 1, None)):
    more = 3 * (total - views(SIMCLR[0]))
  show("the jitter's loop 3 more times", more)
  show('views', total + more)

  method = methods.build(recipe)
  rate = optim.schedule(recipe, recipe.data.examples)
  optimizer = optim.build(recipe, rate)

  def step(state, rows):
    return train_state.train_step(method, optimizer, rate, recipe, state, {}, rows)

  state = jax.eval_shape(lambda: train_state.create(method, optimizer, 0, SIZE))
  with jax.set_mesh(mesh):
    whole = cost(step, state, rows)
  show('whole step', whole + more)
  show('views / step; target: below 10 %', 100 * (total + more) / (whole + more), ' %')
  # The products of crop and blur are to be of the highest precision: six passes on a TPU.
  views_passes, step_passes = (x[0, 0] + more[0, 0] + 5 * products[0, 0] for x in (total, whole))
  print(f"GFLOP with a TPU's six passes {100 * views_passes / step_passes:12.1f} %")


if __name__ == '__main__':
  main()
