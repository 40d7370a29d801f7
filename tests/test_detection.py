"""Detection transfer, benchmarks/detection: average precision, VOC folders, the network, training and resuming."""

import argparse
import fractions
import functools
import itertools
import json
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

FOLDER = pathlib.Path(__file__).parents[1] / 'benchmarks' / 'detection'
sys.path.insert(0, str(FOLDER))

import average_precision as ap  # noqa: E402
import voc  # noqa: E402

TORCH = 'make test-interop runs the tests that need PyTorch'


# Average precision.


def plain(truth, found, metric, threshold):
  """AP of a single class in fractions, from the definition: nothing is sorted or summed up in arrays."""
  positives = sum(int(not d) for image in truth for d in image['difficult'])
  pairs = [(-float(s), i, k) for i, image in enumerate(found) for k, s in enumerate(image['scores'])]  # fmt: skip
  curve, right, wrong, taken = [], 0, 0, set()
  for _, i, k in sorted(pairs):
    overlaps = [iou(found[i]['boxes'][k], box) for box in truth[i]['boxes']]
    best = max(range(len(overlaps)), key=lambda g: (overlaps[g], -g), default=None)  # noqa: B023
    if best is None or overlaps[best] <= threshold:
      wrong += 1
    elif truth[i]['difficult'][best]:
      continue
    elif (i, best) in taken:
      wrong += 1
    else:
      taken.add((i, best))
      right += 1
    curve.append((fractions.Fraction(right, positives), fractions.Fraction(right, right + wrong)))
  if metric == 'voc07':
    recalls = [fractions.Fraction(k, 10) for k in range(11)]
    return sum(max((p for r, p in curve if r >= t), default=0) for t in recalls) / 11
  area, last = fractions.Fraction(0), fractions.Fraction(0)
  for r, _ in curve:
    area += (r - last) * max(p for other, p in curve if other >= r)
    last = r
  return area


def iou(a, b):
  """Overlap as VOC's evaluation computes it: pixels counted from 1, the last one included."""
  a, b = ([fractions.Fraction(float(v)) for v in box] for box in (a, b))
  a, b = ([x0 + 1, y0 + 1, x1, y1] for x0, y0, x1, y1 in (a, b))
  w = min(a[2], b[2]) - max(a[0], b[0]) + 1
  h = min(a[3], b[3]) - max(a[1], b[1]) + 1
  common = max(w, 0) * max(h, 0)
  area = sum((x1 - x0 + 1) * (y1 - y0 + 1) for x0, y0, x1, y1 in (a, b))
  return common / (area - common)


def truth_of(*boxes, difficult=(), labels=None):
  n = len(boxes)
  return {
    'boxes': np.array(boxes, float).reshape(-1, 4),
    'labels': np.array(labels or [1] * n, int),
    'difficult': np.array([k in difficult for k in range(n)], bool),
  }


def found_of(*boxes, scores=(), labels=None):
  return {
    'boxes': np.array(boxes, float).reshape(-1, 4),
    'labels': np.array(labels or [1] * len(boxes), int),
    'scores': np.array(scores, float),
  }


def shifted(dx, size=100):
  """A box of 100 x 100 pixels, moved to the right."""
  return [dx, 0, size + dx, 100]


# (truth, found, AP50 of 'voc07' by hand)
CASES = {
  'right': ([truth_of(shifted(0))], [found_of(shifted(5), scores=[0.9])], 1),
  'nothing found': ([truth_of(shifted(0))], [found_of()], 0),
  'second detection of a box is wrong': (
    [truth_of(shifted(0), shifted(500))],
    [found_of(shifted(1), shifted(2), shifted(500), scores=[0.9, 0.8, 0.7])],
    (6 + 5 * fractions.Fraction(2, 3)) / 11,
  ),
  'all detections of a difficult box are ignored': (
    [truth_of(shifted(0), shifted(500), difficult=[0])],
    [found_of(shifted(1), shifted(2), shifted(500), scores=[0.9, 0.8, 0.7])],
    1,
  ),
  'an image without boxes': (
    [truth_of(), truth_of(shifted(0))],
    [found_of(shifted(0), scores=[0.9]), found_of(shifted(0), scores=[0.8])],
    fractions.Fraction(1, 2),
  ),
  'equal scores: the first image first': (
    [truth_of(shifted(0)), truth_of()],
    [found_of(shifted(0), scores=[0.5]), found_of(shifted(0), scores=[0.5])],
    1,
  ),
  'an overlap of exactly half': ([truth_of([0, 0, 2, 1])], [found_of([0, 0, 1, 1], scores=[1])], 0),
  'recall of exactly 3 / 10': (
    [truth_of(*(shifted(200 * k) for k in range(10)))],
    [found_of(*(shifted(200 * k) for k in range(3)), scores=[0.9, 0.8, 0.7])],
    fractions.Fraction(4, 11),
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', CASES)
def test_average_precision_by_hand(name):
  """Breaks if a duplicate counts as right, a difficult box as missed, or a recall of 3/10 is rounded below 0.3."""
  truth, found, wanted = CASES[name]
  assert ap.evaluate(truth, found, 'voc07')['AP50'] == pytest.approx(100 * float(wanted), abs=1e-9)
  assert plain(truth, found, 'voc07', fractions.Fraction(1, 2)) == wanted


def random_case(seed, classes, images=13, ties=False):
  """Boxes with jittered, duplicated, missing and invented detections."""
  rng = np.random.default_rng(seed)
  truth, found = [], []
  for _ in range(images):
    n = rng.integers(0, 5)
    low = rng.integers(0, 60, (n, 2))
    boxes = np.concatenate([low, low + rng.integers(8, 40, (n, 2))], axis=1).astype(float)
    labels = rng.integers(1, classes + 1, n)
    keep = np.repeat(np.arange(n), rng.integers(0, 3, n))
    moved = boxes[keep] + rng.integers(-4, 5, (len(keep), 4))
    moved = np.concatenate([moved, np.tile([5, 5, 30, 30], (rng.integers(0, 2), 1))])
    moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
    guess = np.append(labels[keep], rng.integers(1, classes + 1, len(moved) - len(keep)))
    scores = rng.random(len(moved))
    truth.append({'boxes': boxes, 'labels': labels, 'difficult': rng.random(n) < 0.2})
    scores = np.round(scores, 1) if ties else scores
    found.append({'boxes': moved, 'labels': guess.astype(int), 'scores': scores})
  return truth, found


@pytest.mark.parametrize('metric', ['voc07', 'area'])
@pytest.mark.parametrize('seed', range(3))
def test_average_precision_equals_the_definition(metric, seed):
  """Breaks if the +1 of VOC's pixels, a threshold, ties of scores or the area are computed in another way."""
  truth, found = random_case(seed, classes=1, ties=seed == 1)
  result = ap.evaluate(truth, found, metric)
  values = [plain(truth, found, metric, fractions.Fraction(t, 100)) for t in range(50, 100, 5)]
  wanted = {'AP50': values[0], 'AP75': values[5], 'AP': sum(values) / len(values)}
  for name, value in wanted.items():
    assert result[name] == pytest.approx(100 * float(value), abs=1e-9)


def test_classes_without_boxes_do_not_count():
  """Breaks if a class without a box, or with difficult boxes only, lowers the mean."""
  truth = [truth_of(shifted(0), shifted(500), labels=[2, 3], difficult=[1])]
  found = [found_of(shifted(0), shifted(0), scores=[0.9, 0.8], labels=[2, 1])]
  assert ap.evaluate(truth, found, 'area')['per_class'] == {2: 100.0}
  with pytest.raises(ValueError, match='no test image'):
    ap.evaluate([truth_of()], [found_of()], 'area')


@pytest.mark.parametrize('seed', range(3))
def test_coco_metric_equals_pycocotools(seed):
  """Breaks if matching, ties, ignored boxes or the 101 recalls are not COCO's."""
  pytest.importorskip('pycocotools', reason=TORCH)
  from pycocotools import coco, cocoeval

  class Evaluation(cocoeval.COCOeval):
    def _prepare(self):
      super()._prepare()
      for gt in itertools.chain(*self._gts.values()):
        gt['ignore'] = gt['difficult']

  truth, found = random_case(seed + 10, classes=3, images=17, ties=seed == 1)
  sides = lambda b: [b[0], b[1], b[2] - b[0], b[3] - b[1]]  # noqa: E731
  annotations = [
    {'image_id': i, 'category_id': int(c), 'bbox': sides(b), 'area': 1, 'iscrowd': 0, 'difficult': int(d)}
    for i, t in enumerate(truth)
    for b, c, d in zip(t['boxes'], t['labels'], t['difficult'])
  ]  # fmt: skip
  detections = [
    {'image_id': i, 'category_id': int(c), 'bbox': sides(b), 'score': float(s)}
    for i, f in enumerate(found)
    for b, c, s in zip(f['boxes'], f['labels'], f['scores'])
  ]
  data = coco.COCO()
  data.dataset = {
    'info': {},
    'images': [{'id': i} for i in range(len(truth))],
    'categories': [{'id': c} for c in (1, 2, 3)],
    'annotations': [{'id': k, **a} for k, a in enumerate(annotations, 1)],
  }
  data.createIndex()
  theirs = Evaluation(data, data.loadRes(detections), 'bbox')
  theirs.evaluate()
  theirs.accumulate()
  theirs.summarize()
  ours = ap.evaluate(truth, found, 'coco')
  for k, name in enumerate(('AP', 'AP50', 'AP75')):
    assert ours[name] == pytest.approx(100 * theirs.stats[k], abs=1e-9)


# Folders in the layout of VOC.

BOX = '<object><name>{}</name>{}<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>'


def write_image(folder, name, objects, size=(64, 48)):
  """Draws an image with the boxes and writes its annotation; objects: (class, difficult, xmin, ymin, xmax, ymax)."""
  for part in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
    (folder / part).mkdir(parents=True, exist_ok=True)
  image = Image.new('RGB', size, (120, 120, 120))
  draw = ImageDraw.Draw(image)
  for label, _, *box in objects:
    draw.rectangle([v - 1 for v in box], fill={'dog': (220, 30, 30)}.get(label, (30, 30, 220)))
  image.save(folder / 'JPEGImages' / f'{name}.jpg', quality=95)
  parts = [BOX.format(c, f'<difficult>{d}</difficult>', *box) for c, d, *box in objects]
  (folder / 'Annotations' / f'{name}.xml').write_text(f'<annotation>{"".join(parts)}</annotation>')


def dataset(folder, images=6):
  """A folder with the splits train and test."""
  rng = np.random.default_rng(0)
  names = [f'{k:06}' for k in range(images)]
  for k, name in enumerate(names):
    x, y = (int(v) for v in rng.integers(1, 20, 2))
    write_image(folder, name, [(('dog', 'cat')[k % 2], 0, x, y, x + 25, y + 20)])
  half = images // 2
  for split, part in (('train', names[:half]), ('test', names[half:])):
    (folder / 'ImageSets' / 'Main' / f'{split}.txt').write_text('\n'.join(part) + '\n')
  return folder


def test_boxes_of_voc_and_flips(tmp_path):
  """Breaks if pixels are not counted from 1, or a flip moves the boxes elsewhere than the pixels."""
  write_image(tmp_path, 'a', [('dog', 1, 11, 6, 40, 30)])
  record = voc.annotation(tmp_path, 'a')
  np.testing.assert_array_equal(record['boxes'], [[10, 5, 40, 30]])
  assert record['difficult'].tolist() == [True]
  images = voc.Images([record], ['cat', 'dog'])
  for flip in (False, True):
    item = images[0, flip]
    (x0, y0, x1, y1) = (int(v) for v in item['boxes'][0])
    red = item['image'][..., 0].astype(int) - item['image'][..., 2] > 90
    rows, columns = np.nonzero(red.any(1))[0], np.nonzero(red.any(0))[0]
    # JPEG blurs the edges of colours by a pixel or two.
    edges = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    np.testing.assert_allclose(edges, [x0, y0, x1, y1], atol=2)
    assert item['labels'].tolist() == [2]


def test_orientation_of_photographs(tmp_path):
  """Breaks if a photograph that is stored turned is checked or decoded as it is stored."""
  write_image(tmp_path, 'a', [('dog', 0, 1, 1, 48, 64)])
  path = tmp_path / 'JPEGImages' / 'a.jpg'
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.new('RGB', (64, 48)).save(path, exif=exif)
  images = voc.Images([voc.annotation(tmp_path, 'a')], ['dog'])
  assert images[0, False]['image'].shape == (64, 48, 3)


DAMAGES = {
  'Annotations/000000.xml': [
    (None, 'is missing'),
    ('<annotation><object>', 'is no XML'),
    ('\x00\x01', 'is no XML'),
    ('<annotation><object><name>dog</name></object></annotation>', 'not four numbers'),
    (BOX.format('dog', '', 1, 1, 'x', 9), 'not four numbers'),
    (BOX.format('', '', 1, 1, 9, 9), 'without a name'),
    (BOX.format('dog', '', 1, 1, 65, 9), 'not inside of the image'),
    (BOX.format('dog', '', -1, 1, 9, 9), 'not inside of the image'),
    (BOX.format('dog', '', 9, 1, 3, 9), 'not inside of the image'),
    (BOX.format('dog', '', 'nan', 1, 3, 9), 'not inside of the image'),
    (BOX.format('dog', '', 1, 1, 3, 'inf'), 'not inside of the image'),
    (BOX.format('cow', '', 1, 1, 9, 9), "the class 'cow'"),
  ],
  'JPEGImages/000000.jpg': [(None, 'is missing'), ('text', 'is no image')],
  'ImageSets/Main/train.txt': [(None, 'is missing'), ('\n', 'lists no image')],
}


@pytest.mark.parametrize(
  'path,content,message', [(p, c, m) for p, cases in DAMAGES.items() for c, m in cases]
)
def test_damaged_folders(tmp_path, path, content, message):
  """Breaks if a damaged file is skipped, or is not named in one sentence."""
  folder = dataset(tmp_path / 'data')
  (folder / path).unlink()
  if content is not None:
    (folder / path).write_text(content)
  with pytest.raises(voc.Problem, match=message) as error:
    voc.Images(voc.read(folder, 'train'), ['cat', 'dog'])
  assert path.split('/')[-1] in str(error.value) and '\n' not in str(error.value)


def test_image_that_cannot_be_decoded(tmp_path):
  """Breaks if half of an image is used, or the error is a traceback."""
  folder = dataset(tmp_path / 'data')
  path = folder / 'JPEGImages' / '000000.jpg'
  path.write_bytes(path.read_bytes()[:-200])
  item = voc.Images(voc.read(folder, 'train'), ['cat', 'dog'])[0, False]
  assert isinstance(item, voc.Problem) and 'cannot be decoded' in str(item)


# The network.


def architecture(depth, variant):
  """Plain data of a ResNet with the stem of ImageNet."""
  from simclr_jax import config

  fields = {'model.depth': str(depth), 'model.variant': variant, 'model.stem': 'imagenet'}
  normalize = 'imagenet' if variant == 'torchvision' else 'none'
  recipe = config.load('simclr_images', {**fields, 'model.normalize': normalize, 'image_size': '64'})  # fmt: skip
  return config.architecture(recipe)


def export(folder, depth, variant):
  """Writes an encoder whose weights all differ from their initial values, also gammas of 0; returns it."""
  import dataclasses

  import jax

  from simclr_jax import encoder
  from simclr_jax.interop import model, safetensors_file

  network = encoder.untrained(architecture(depth, variant))
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda x: np.float32(x * rng.uniform(0.8, 1.2, x.shape) + 0.05 * (x.ndim == 1)),
    jax.device_get(network.variables),
  )
  network = dataclasses.replace(network, variables=variables)
  folder.mkdir()
  safetensors_file.write(model.of(network), folder)
  return network


@pytest.mark.parametrize('variant', ['simclr', 'torchvision'])
@pytest.mark.parametrize('depth', [18, pytest.param(50, marks=pytest.mark.slow)])
def test_body_equals_ours(tmp_path, depth, variant):
  """Breaks if the padding or the normalisation of the detector's body is not that of the encoder."""
  torch = pytest.importorskip('torch', reason=TORCH)
  import detector
  import jax

  from simclr_jax.models import encoders

  network = export(tmp_path / 'export', depth, variant)
  weights = detector.load(str(tmp_path / 'export'), 50, '', '')
  assert (weights.depth, weights.variant) == (depth, variant)
  model = detector.build('c4', weights, 2, [96], 96, 1333, 8).eval()
  net = encoders.build(network.architecture)
  last = f'group3_block{2 if depth == 18 else 6}'
  for h, w in ((160, 256), (161, 255)):
    x = np.random.default_rng(0).random((1, h, w, 3), np.float32)
    with jax.default_matmul_precision('highest'):
      _, state = net.apply(
        network.variables, x, train=False, mutable=['intermediates'],
        capture_intermediates=lambda module, _: module.name == last,
      )  # fmt: skip
    wanted = np.asarray(state['intermediates'][last]['__call__'][0])
    with torch.no_grad():
      images = model.transform.normalize(torch.from_numpy(x[0].transpose(2, 0, 1)))
      found = model.backbone(images[None]).numpy().transpose(0, 2, 3, 1)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_weights_that_are_refused(tmp_path):
  """Breaks if weights of another network are loaded in part, or code in a file is executed."""
  torch = pytest.importorskip('torch', reason=TORCH)
  import pickle

  import detector
  from safetensors.torch import save_file

  state = {k: v for k, v in detector.resnet(18, 'torchvision').state_dict().items()}
  broken = {**state, 'bn1.bias': state['bn1.bias'] * float('nan')}
  cases = {
    'lacks bn1.bias': {k: v for k, v in state.items() if k != 'bn1.bias'},
    'also has extra': {**state, 'extra': torch.zeros(1)},
    'not finite in bn1.bias': broken,
    'another stem': {**state, 'conv1.weight': torch.zeros(64, 3, 3, 3)},
    'another width': {**state, 'conv1.weight': torch.zeros(128, 3, 7, 7)},
    'names that are not those': {f'module.{k}': v for k, v in state.items()},
    'no dict of tensors': {'state_dict': state},
    'blocks': {k: v for k, v in state.items() if not k.startswith('layer3.1')},
  }
  for message, tensors in cases.items():
    torch.save(tensors, tmp_path / 'w.pth')
    with pytest.raises(voc.Problem, match=message):
      detector.load(str(tmp_path / 'w.pth'), 50, '', 'imagenet')
  torch.save(state, tmp_path / 'w.pth')
  with pytest.raises(voc.Problem, match='--normalize'):
    detector.load(str(tmp_path / 'w.pth'), 50, '', '')
  assert detector.load(str(tmp_path / 'w.pth'), 50, '', 'imagenet').depth == 18
  (tmp_path / 'w.pth').write_bytes((tmp_path / 'w.pth').read_bytes()[:5000])
  with pytest.raises(voc.Problem, match='damaged'):
    detector.load(str(tmp_path / 'w.pth'), 50, '', 'imagenet')
  about = {'architecture': {'variant': 'haiku'}}
  save_file(state, tmp_path / 'w.safetensors', {'simclr_jax': json.dumps(about)})
  with pytest.raises(voc.Problem, match='variant haiku'):
    detector.load(str(tmp_path / 'w.safetensors'), 50, '', 'imagenet')
  marker = tmp_path / 'executed'
  (tmp_path / 'evil.pth').write_bytes(pickle.dumps(_Evil(marker)))
  with pytest.raises(voc.Problem, match='damaged'):
    detector.load(str(tmp_path / 'evil.pth'), 50, '', 'imagenet')
  assert not marker.exists()


class _Evil:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


# Training.


@pytest.fixture
def program(tmp_path, monkeypatch):
  """Runs the program on a drawn data set: `program(*options)` returns the exit code and the folder of the output."""
  torch = pytest.importorskip('torch', reason=TORCH)
  import train

  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  folder = dataset(tmp_path / 'data')
  handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

  base = (
    f'--data={folder}', '--train=train', '--test=test', '--weights=random', '--depth=18', '--batch=2', '--iterations=4',
    '--warmup=2', '--regions=4', '--train-sizes=48,64', '--test-size=48', '--precise-bn=1', '--workers=0', '--device=cpu',
  )  # fmt: skip

  def run(*options, out='out', own_process=False):
    argv = [str(FOLDER / 'train.py'), *base, f'--out={tmp_path / out}', *options]
    if own_process:
      return subprocess.run([sys.executable, *argv]).returncode, tmp_path / out
    monkeypatch.setattr(train, 'stopping', False)
    monkeypatch.setattr(sys, 'argv', argv)
    return train.main(), tmp_path / out

  yield run
  torch.set_num_threads(threads)
  for number, handler in handlers.items():
    signal.signal(number, handler)


def test_resumed_training_is_the_uninterrupted_one(program, monkeypatch):
  """Breaks if the order, the draws, the momentum or the learning rate change when a training resumes."""
  torch = pytest.importorskip('torch', reason=TORCH)
  import train

  code, whole = program(out='whole')
  assert code == 0
  original = train.step

  def stopped_step(model, optimizer, batch, rate, seed, place):
    losses = original(model, optimizer, batch, rate, seed, place)
    if seed[1] == 1:
      signal.raise_signal(signal.SIGTERM)
    return losses

  monkeypatch.setattr(train, 'step', stopped_step)
  assert program(out='parts')[0] == train.STOPPED
  load = functools.partial(torch.load, weights_only=True)
  assert load(whole.with_name('parts') / 'seed0' / 'checkpoint.pt')['iteration'] == 2
  monkeypatch.setattr(train, 'step', original)
  code, parts = program(out='parts')
  assert code == 0
  a, b = (load(out / 'seed0' / 'checkpoint.pt') for out in (whole, parts))
  assert a['model'].keys() == b['model'].keys()
  assert all(torch.equal(a['model'][name], b['model'][name]) for name in a['model'])
  results = [json.loads((out / 'results.json').read_text()) for out in (whole, parts)]
  assert results[0] == results[1]
  assert results[0]['test_images'] == 3 and results[0]['metric'] == 'area'


@pytest.mark.parametrize('kind', ['c4', 'fpn'])
def test_one_step_trains_everything(kind):
  """Breaks if a part of the network is frozen, or BatchNorm is not trained."""
  torch = pytest.importorskip('torch', reason=TORCH)
  import detector
  import train

  torch.manual_seed(0)
  weights = detector.load('random', 18, 'simclr', 'none')
  model = detector.build(kind, weights, 2, [64], 64, 1333, 4).train()
  optimizer = torch.optim.SGD(train.groups(model), lr=0.1)
  assert sum(len(g['params']) for g in optimizer.param_groups) == len(list(model.parameters()))
  before = {name: x.clone() for name, x in model.state_dict().items()}
  boxes = np.float32([[5, 5, 40, 40], [20, 10, 60, 50]])
  rng = np.random.default_rng(0)
  batch = [
    {'image': rng.integers(0, 256, (50, 64, 3), np.uint8), 'boxes': boxes, 'labels': np.array([1, 2])}
    for _ in range(2)
  ]  # fmt: skip
  losses = train.step(model, optimizer, batch, 0.1, (0, 0), train.Place(torch.device('cpu'), 0, 1))
  assert len(losses) == 4 and all(np.isfinite(float(x)) for x in losses.values())
  after = model.state_dict()
  same = [name for name, x in before.items() if torch.equal(x, after[name])]
  assert not same


def test_precise_bn_is_the_mean_over_batches(tmp_path, monkeypatch):
  """Breaks if the statistics remain running averages, or the weights change."""
  torch = pytest.importorskip('torch', reason=TORCH)
  import train

  batches = [torch.full((2, 3, 4, 4), float(k)) + torch.randn(2, 3, 4, 4) for k in range(3)]
  monkeypatch.setattr(train, 'loader', lambda *_: batches)
  monkeypatch.setattr(train, 'on_device', lambda batch, _: (batch,))
  norm = torch.nn.BatchNorm2d(3)
  norm(torch.randn(2, 3, 4, 4) + 9)
  place = train.Place(torch.device('cpu'), 0, 1)
  args = argparse.Namespace(iterations=0, precise_bn=3)
  assert train.precise_bn(torch.nn.Sequential(norm), args, None, 0, place)
  means = torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0)
  variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in batches]).mean(0)
  torch.testing.assert_close(norm.running_mean, means)
  torch.testing.assert_close(norm.running_var, variances)
  assert norm.momentum == 0.1


def test_schedule_and_order():
  """Breaks if the steps are not at 18k and 22k of 24k, or an image is drawn twice before all others."""
  pytest.importorskip('torch', reason=TORCH)
  import train

  args = argparse.Namespace(lr=0.02, warmup=100, iterations=24_000)
  rates = {0: 2e-5, 50: 0.01001, 100: 0.02, 17_999: 0.02, 18_000: 0.002, 21_999: 0.002, 22_000: 2e-4}  # fmt: skip
  for i, rate in rates.items():
    assert train.learning_rate(i, args) == pytest.approx(rate)
  all_keys = list(train.order(5, 3, 7, 0, 10))
  indices = [k for keys in all_keys for k, _ in keys]
  assert all(sorted(indices[k : k + 5]) == list(range(5)) for k in range(0, 30, 5))
  assert len({flip for keys in all_keys for _, flip in keys}) == 2
  assert list(train.order(5, 3, 7, 4, 10)) == all_keys[4:]
  assert list(train.order(5, 3, 8, 0, 10)) != all_keys


def test_errors_are_one_sentence(program, tmp_path, capfd):
  """Breaks if a mistake of the user ends with a traceback or another exit code than 1."""
  image = tmp_path / 'data' / 'JPEGImages' / '000000.jpg'
  whole = image.read_bytes()
  cases = {
    'is no folder': ('--data=/nowhere',),
    'is missing': ('--train=other',),
    "the class 'cat'": ('--classes=dog',),
    'VOC2007': ('--test=VOC2007/test',),
    'nowhere is missing': ('--weights=/nowhere',),
  }
  for message, options in cases.items():
    assert program(*options)[0] == 1
    check_error(capfd, message)
  image.write_bytes(whole[:-200])
  assert program('--workers=1', own_process=True)[0] == 1
  check_error(capfd, 'cannot be decoded')
  image.write_bytes(whole)
  assert program('--lr=1e30', '--warmup=0')[0] == 1
  check_error(capfd, 'not finite')


def check_error(capfd, message):
  stderr = capfd.readouterr().err
  assert message in stderr and 'Traceback' not in stderr
  assert len([line for line in stderr.split('\n') if line.startswith('error: ')]) == 1


def test_finished_and_damaged_outputs(program, tmp_path, capfd):
  """Breaks if a result of other settings is reported, or a damaged checkpoint is a traceback."""
  assert program('--iterations=1')[0] == 0
  result = json.loads((tmp_path / 'out' / 'seed0' / 'result.json').read_text())
  assert set(result) > {'AP', 'AP50', 'AP75', 'per_class', 'settings'}
  assert program('--iterations=2')[0] == 1
  check_error(capfd, 'iterations 1 instead of 2')
  (tmp_path / 'out' / 'seed0' / 'result.json').unlink()
  checkpoint = tmp_path / 'out' / 'seed0' / 'checkpoint.pt'
  checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
  assert program('--iterations=1')[0] == 1
  check_error(capfd, 'checkpoint.pt is damaged')
