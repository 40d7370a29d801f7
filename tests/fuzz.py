"""Damages every kind of file that the program reads: python tests/fuzz.py --count=300 [KIND ...]

Each mutant is read in a process that may die. A mutant passes if the program gives the right result or refuses the file
with one sentence. It fails if the program crashes, raises another exception, takes more than 20 seconds or 2 GB of
memory, or, where a checksum protects the file, gives another result without a word.
"""

import argparse
import hashlib
import io
import json
import os
import pathlib
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback

import numpy as np

SECONDS, MEMORY = 20, 2 * 2**30
BLOCK = 50  # mutants per process


# Mutations.


def mutate(data: bytes, rng: random.Random) -> bytes:
  """Damages the contents of a file in one of many ways."""
  if data[:1] in b'{[' and rng.random() < 0.6:
    try:
      return json.dumps(_mutate_value(json.loads(data), rng)).encode()
    except (ValueError, RecursionError):
      pass
  data = bytearray(data)
  at = rng.randrange(len(data) + 1)
  length = min(rng.choice((1, 2, 4, 8, 64, 1000)), len(data) - at)
  kind = rng.randrange(8)
  if kind == 0 and data:
    for _ in range(rng.choice((1, 1, 3, 20))):
      data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  elif kind == 1:
    del data[at:]
  elif kind == 2:
    del data[at : at + length]
  elif kind == 3:
    data[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
  elif kind == 4:
    data[at : at + length] = rng.choice((b'\0', b'\xff', b'\x7f', b'\x80')) * length
  elif kind == 5:
    data[at : at + length] = rng.randbytes(length)
  elif kind == 6:
    data[at:at] = data[at : at + length] * rng.choice((1, 2, 50))
  else:
    head = rng.randrange(min(len(data), 64) + 1)  # sizes are in the first bytes
    data[head : head + 4] = rng.choice(
      (b'\xff\xff\xff\xff', b'\0\0\0\0', b'\x7f\xff\xff\xff', b'\xff\xff\xff\x7f')
    )
  return bytes(data)


def _mutate_value(value, rng):
  """Replaces, removes or renames one part of plain data."""
  if rng.random() < 0.25 or not isinstance(value, (dict, list)) or not value:
    nested = []
    for _ in range(rng.choice((3, 5000 if rng.random() < 0.1 else 30))):
      nested = [nested]
    return rng.choice((
      None, True, 0, -1, 1.5, 10**18, 10**400, 1e308, float('nan'), float('inf'), '', 'x', '\0', '../../x', '<b>&"',
      '\x1b[31m', 'x' * 10**5, [], {}, [[]], {'': {}}, [None] * 1000, nested,
    ))  # fmt: skip
  value = value.copy()
  key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
  choice = rng.random()
  if choice < 0.1:
    del value[key]
  elif choice < 0.2 and isinstance(value, dict):
    value[rng.choice(('', 'x', '\0', 'step', str(key) + 'x'))] = value.pop(key)
  else:
    value[key] = _mutate_value(value[key], rng)
  return value


# Kinds of files. `prepare` writes sound files and names those to mutate; `read` gives what must not change.


class Config:
  """config.json of a run, which has checkpoints."""

  strict = True

  def prepare(self, folder):
    return [run(folder) / 'config.json']

  def read(self, folder):
    from simclr_jax import config, run_config, runs

    recipe = config.flatten(run_config.load(folder / 'run'))
    return sorted(map(repr, recipe.items())), runs.load_encoder(folder / 'run').digest()


class Checkpoint:
  """A file of one of two checkpoints: the other one is used instead."""

  strict = True

  def prepare(self, folder):
    return [p for p in (run(folder) / 'checkpoints').rglob('*') if p.is_file()]

  def read(self, folder):
    from simclr_jax import runs

    encoder = runs.load_encoder(folder / 'run')
    return {2: 'a', 4: 'b'}[encoder.provenance['step']], encoder.digest()

  def same(self, folder, value, _):
    """Whether it is the state of one of the two checkpoints."""
    from simclr_jax.runtime import checkpoint

    if not hasattr(self, '_sound'):
      sound = folder.parent / 'sound/run'
      self._sound = []
      for step in (2, 4):
        part = folder.parent / f'only-{step}'
        shutil.copytree(sound, part)
        shutil.rmtree(part / 'checkpoints' / str(6 - step))
        from simclr_jax import runs

        self._sound.append(runs.load_encoder(part).digest())
        assert checkpoint.last_step(part / 'checkpoints') == step
    return value[1] == self._sound[value[0] == 'b']


class Export:
  """A file of an exported encoder."""

  strict = True

  def prepare(self, folder):
    from simclr_jax import runs
    from simclr_jax.interop import orbax

    orbax.export(runs.load_encoder(run(folder)), folder / 'encoder')
    return [p for p in (folder / 'encoder').rglob('*') if p.is_file()] + 20 * [
      folder / 'encoder/encoder.json'
    ]

  def read(self, folder):
    from simclr_jax.interop import orbax

    encoder = orbax.load(folder / 'encoder')
    return json.dumps(encoder.architecture, sort_keys=True), encoder.digest()


class Evaluation:
  """evaluation.json of a run, and its part of the report."""

  strict = True

  def prepare(self, folder):
    from simclr_jax.evaluate import results

    rng = np.random.default_rng(0)
    labels = np.arange(100) % 4
    tests = [{'top1': 0.5, 'parameters': 100, 'confusion': rng.integers(0, 9, (4, 4)).tolist()}]
    few = {
      'title': 'Few labels', 'columns': ['1 per class', '2 per class'],
      'rows': {'raw pixels': [[30.0, 1.0], [35.0, None]], 'fine-tuned': [[50.0, None], [60.0, 2.0]]},
      'labels_per_class': [1, 2], 'runs': {'fine-tuned': {'1': tests, '2': tests}}, 'class_names': list('abcd'),
    }  # fmt: skip
    students = {
      'title': 'Distillation', 'columns': ['top-1 %', 'parameters, millions'],
      'rows': {'teacher': [[50.0, None], [0.1, None]], 'student': [[60.0, None], [0.05, None]]},
      'runs': {'teacher': tests, 'student': tests}, 'class_names': list('abcd'),
    }  # fmt: skip
    data = {
      s: {'fingerprint': 1, 'images': 100, 'split': s, 'dir': '/data'} for s in ('train', 'test')
    }
    knn = {'title': 'kNN', 'columns': ['top-1 %'], 'rows': {'pretrained': [[60.0, None]]}}
    for name, result in (('knn', knn), ('finetune', few), ('distillation', students)):
      sizes = [100, None] if name == 'distillation' else None
      results.save(
        folder,
        name,
        results.assess(result, labels, sizes),
        {'step': 4, 'checkpoint': 5, 'data': data},
      )
    return [folder / 'evaluation.json']

  def read(self, folder):
    from simclr_jax.evaluate import results
    from simclr_jax.report import evaluations

    found = results.load(folder)
    for result in found.values():
      results.table(result)
    list(evaluations.sections(folder, 4, []))
    results.check(folder)
    return [{k: v for k, v in result.items() if k != 'checksum'} for result in found.values()]

  def same(self, _, value, expected):
    """Whether no result has changed: a result that is gone is as if it had never been evaluated."""
    return all(result in expected for result in value)


class Metrics:
  """metrics.jsonl: it has no checksum, so only what is no record is refused."""

  strict = False

  def prepare(self, folder):
    return [run(folder) / 'metrics.jsonl']

  def read(self, folder):
    from simclr_jax import diagnostics, run_config
    from simclr_jax.report import figures, page
    from simclr_jax.runtime import logs

    records = logs.read(folder / 'run')
    steps = [r for r in records if 'loss' in r]
    if len(records) % 5 == 0:  # drawing takes longer than all the rest
      figures.curves(records)
      figures.diagnostic_curves(steps)
    diagnostics.findings(run_config.load(folder / 'run'), steps)
    list(page._goodput(records))
    list(page._speed(steps))
    logs.Log(folder / 'run', 3, 4, tensorboard=False, shows=False).close()


class Parts:
  """The parts of an interrupted embed."""

  strict = True

  def prepare(self, folder):
    from simclr_jax import data
    from simclr_jax.evaluate import embed

    run(folder)
    embed.PART = 8
    self._dataset = data.Arrays(images(24), np.zeros(24, np.int32))
    delete, embed._Parts.delete = embed._Parts.delete, lambda self: None
    self.read(folder)
    embed._Parts.delete = delete
    (folder / 'f.npy').unlink()
    return sorted((folder / 'f.npy.parts').iterdir())

  def read(self, folder):
    from simclr_jax import runs
    from simclr_jax.evaluate import embed

    if not hasattr(self, '_encoder'):
      self._encoder = runs.load_encoder(folder / 'run')
    embed.embed(self._encoder, self._dataset, folder / 'f.npy')
    return hashlib.sha256((folder / 'f.npy').read_bytes()).hexdigest()


class Data:
  """A data set on disk."""

  strict = False
  place = '.'

  def read(self, folder):
    from simclr_jax import config, data, encoder
    from simclr_jax.data import discover

    recipe = config.load('simclr_images', discover.fields(str(folder / self.place), {}))
    train, test = data.load_splits(recipe.data)
    for part in (train, test):
      if part is not None and len(part):
        encoder.preprocess(part, 'center_crop(1)', 32)


class Npy(Data):
  """An array of images, and its labels."""

  place = 'train_images.npy'

  def prepare(self, folder):
    np.save(folder / 'train_images.npy', images(20))
    np.save(folder / 'train_labels.npy', np.arange(20) % 4)
    return [folder / 'train_images.npy', folder / 'train_labels.npy']


class Npz(Data):
  """Arrays of images and labels in one file."""

  place = 'train.npz'

  def prepare(self, folder):
    save = random.Random(0).choice((np.savez, np.savez_compressed))
    save(
      folder / 'train.npz',
      images=images(20),
      labels=np.arange(20) % 4,
      class_names=np.array(list('abcd')),
    )
    return [folder / 'train.npz']


class Table(Data):
  """A table of images."""

  place = 'labels.csv'

  def prepare(self, folder):
    write_pictures(folder / 'images', ('png',), 8)
    rows = [f'images/{i}.png,class{i % 2},{"test" if i > 5 else "train"}' for i in range(8)]
    (folder / 'labels.csv').write_text('\n'.join(['path,label,split', *rows, '']))
    return [folder / 'labels.csv']


class Image(Data):
  """An image file of one of many formats."""

  place = 'images'

  def prepare(self, folder):
    return write_pictures(folder / 'images', FORMATS, 1)


class Records(Data):
  """A TFRecord file of TFDS, or its metadata."""

  place = 'mine'

  def prepare(self, folder):
    import test_records

    encoded = [test_records.jpeg(i) for i in range(6)]
    test_records.write(folder / 'mine', encoded, (3, 3), labels=[0, 1, 2, 3, 0, 1])
    return [p for p in (folder / 'mine').iterdir() if p.is_file()]


class Torch:
  """Weights in the two formats of PyTorch and in safetensors; only the zip format has checksums."""

  strict = False

  def prepare(self, folder):
    import safetensors.numpy
    import test_weights_torch as examples

    from simclr_jax.interop import pickles

    tree, *_ = examples.moco_file()
    pickles.write(folder / 'zip.pth', tree)
    examples.legacy(folder / 'legacy.pth', tree)
    safetensors.numpy.save_file(examples.T, folder / 'weights.safetensors')
    return [folder / name for name in ('zip.pth', 'legacy.pth', 'weights.safetensors')]

  def read(self, folder):
    from simclr_jax.interop import layouts, weights

    for path in folder.iterdir():
      weights.networks(path, {})
      if path.suffix == '.pth':
        layouts.moco_state(path, {})


class TensorFlow:
  """A checkpoint of TensorFlow, whose values have checksums."""

  strict = True

  def prepare(self, folder):
    import test_weights_tensorflow as examples

    examples.save(
      folder / 'model.ckpt-7', examples.build(16, heads=(32, 7), classes=3, **examples.TINY)[0]
    )
    return sorted(folder.iterdir())

  def read(self, folder):
    import jax

    from simclr_jax.interop import weights
    from simclr_jax.runtime.checksum import crc32

    return [
      crc32(*jax.tree.leaves(n.encoder)) for n in weights.networks(folder / 'model.ckpt-7', {})
    ]


FORMATS = ('jpg', 'progressive.jpg', 'png', '16.png', 'a.png', 'gif', 'bmp', 'webp', 'a.webp', 'tif', 'lzw.tif', 'ppm',
           'jp2', 'avif')  # fmt: skip
KINDS = {
  'config': Config, 'checkpoint': Checkpoint, 'export': Export, 'evaluation': Evaluation, 'metrics': Metrics,
  'parts': Parts, 'npy': Npy, 'npz': Npz, 'table': Table, 'image': Image, 'records': Records, 'torch': Torch,
  'tensorflow': TensorFlow,
}  # fmt: skip


def images(count):
  """Random images."""
  return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def write_pictures(folder, formats, count):
  """Writes images in each of the formats that this Pillow can write; returns the files."""
  import PIL.Image

  folder.mkdir()
  options = {'progressive.jpg': {'progressive': True}, 'lzw.tif': {'compression': 'tiff_lzw'}}
  for i, pixels in enumerate(np.repeat(np.repeat(images(count), 4, 1), 4, 2)):
    for kind in formats:
      picture = PIL.Image.fromarray(pixels)
      if kind.startswith('a.'):
        picture.putalpha(128)
      if kind == '16.png':
        picture = PIL.Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
      try:
        picture.save(folder / f'{i}.{kind}', **options.get(kind, {}))
      except (OSError, KeyError, ValueError):  # this Pillow lacks the format
        (folder / f'{i}.{kind}').unlink(missing_ok=True)
  return sorted(folder.iterdir())


def run(folder):
  """A copy of a short run with the checkpoints 2 and 4."""
  from conftest import TINY

  from simclr_jax import cli

  template = pathlib.Path(os.environ['SIMCLR_JAX_FUZZ_RUN'])
  if not template.exists():
    np.savez(template.with_name('train.npz'), images=images(64), labels=np.arange(64) % 4)
    settings = {
      **TINY,
      'steps': '4',
      'checkpoint_every_steps': '2',
      'data.holdout': '0',
      'image_size': '16',
    }
    arguments = [f'--config.{k}={v}' for k, v in settings.items()]
    data = f'--data={template.with_name("train.npz")}'
    assert (
      cli.main(['pretrain', '--config=simclr_digits', data, f'--workdir={template}', *arguments])
      == 0
    )
  if not (folder / 'run').exists():
    shutil.copytree(template, folder / 'run')
  return folder / 'run'


# The process that reads mutants: a line of JSON for each.


def work(name, seed, first, last):
  """Reads the mutants `first` to `last` - 1 of a kind."""
  sys.path.insert(0, str(pathlib.Path(__file__).parent))
  import conftest  # noqa: F401  (a compilation cache for all processes)

  from simclr_jax.errors import ConfigError
  from simclr_jax.runtime.checkpoint import CheckpointError

  report, sys.stdout, sys.stderr = sys.stdout, io.StringIO(), io.StringIO()
  with tempfile.TemporaryDirectory(prefix='simclr_jax_fuzz') as root:
    sound, place = pathlib.Path(root) / 'sound', pathlib.Path(root) / 'mutant'
    sound.mkdir()
    kind = KINDS[name]()
    targets = [path.relative_to(sound) for path in kind.prepare(sound)]
    shutil.copytree(sound, place)
    expected = kind.read(place)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(first, last):
      rng = random.Random(f'{name} {seed} {i}')
      shutil.rmtree(place)
      shutil.copytree(sound, place)
      target = place / rng.choice(targets)
      target.write_bytes(mutate(target.read_bytes(), rng))
      print(json.dumps({'start': i, 'file': target.name}), file=report, flush=True)
      outcome = 'right'
      try:
        exec(os.environ.get('SIMCLR_JAX_FUZZ_FAULT', ''))  # a fault of the test of this file
        value = kind.read(place)
        if (
          kind.strict
          and value != expected
          and not (hasattr(kind, 'same') and kind.same(place, value, expected))
        ):
          outcome = f'another result: {str(value)[:200]}'
      except (ConfigError, CheckpointError, OSError) as error:
        outcome = (
          'refused'
          if 0 < len(str(error)) < 2000 and '\n' not in str(error)
          else f'no sentence: {error!s:.300}'
        )
      except BaseException:
        outcome = traceback.format_exc()
      grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory)
      if grown > MEMORY:
        outcome = f'{grown / 2**30:.1f} GiB of memory'
      print(json.dumps({'end': i, 'outcome': outcome}), file=report, flush=True)
      if grown > MEMORY:
        return


def fuzz(name: str, count: int, seed: int = 0, first: int = 0) -> tuple[dict[str, int], list[str]]:
  """Reads mutants of a kind; returns the numbers of right and refused ones, and a text for each failure."""
  counts, failures, last = {'right': 0, 'refused': 0}, [], first + count
  while first < last:
    end = min(first + BLOCK, last)
    command = [sys.executable, __file__, '--work', name, str(seed), str(first), str(end)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    errors: list[str] = []
    threading.Thread(
      target=lambda p, e: e.append(p.stderr.read()), args=(process, errors), daemon=True
    ).start()
    timer = _timer(process, 300)  # for the preparation
    current = None
    for line in process.stdout:
      timer.cancel()
      message = json.loads(line)
      if 'start' in message:
        current = f'{name} {message["start"]} ({message["file"]})'
        first = message['start'] + 1
      elif message['outcome'] in counts:
        counts[message['outcome']] += 1
        current = None
      else:
        failures.append(f'{current}: {message["outcome"]}')
        current = None
      timer = _timer(process, SECONDS)
    timer.cancel()
    code = process.wait()
    if current:
      reason = f'no answer in {SECONDS} s' if code == -9 else f'the process ended with {code}'
      failures.append(f'{current}: {reason}')
    elif code:
      raise RuntimeError(f'{name}: {"".join(errors)[-3000:]}')
  return counts, failures


def _timer(process, seconds):
  timer = threading.Timer(seconds, process.kill)
  timer.daemon = True
  timer.start()
  return timer


def main():
  """Prints a line for each kind, and all failures."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('kinds', nargs='*', metavar='KIND', help=', '.join(KINDS))
  parser.add_argument('--count', type=int, default=300)
  parser.add_argument('--first', type=int, default=0)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  failed = 0
  with tempfile.TemporaryDirectory() as folder:
    os.environ.setdefault('SIMCLR_JAX_FUZZ_RUN', f'{folder}/run')
    os.environ.setdefault('SIMCLR_JAX_TEST_CACHE', f'{folder}/cache')
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', os.environ['SIMCLR_JAX_TEST_CACHE'])
    for name in args.kinds or KINDS:
      start = time.monotonic()
      counts, failures = fuzz(name, args.count, args.seed, args.first)
      seconds = time.monotonic() - start
      print(f'{name:12}{args.count:5} mutants, {counts["right"]} right, {counts["refused"]} refused, '
            f'{len(failures)} failed, {seconds:.0f} s', flush=True)  # fmt: skip
      for failure in failures:
        print(f'  {failure}', flush=True)
      failed += len(failures)
  return int(failed > 0)


if __name__ == '__main__':
  if sys.argv[1:2] == ['--work']:
    work(sys.argv[2], *map(int, sys.argv[3:]))
  else:
    sys.exit(main())
