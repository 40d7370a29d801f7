"""Pipelines: parsing, the published pipelines, ops in a file of the user, random draws, views of batches."""

import inspect
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from simclr_jax.data import augment, crop, ops, pixels
from simclr_jax.errors import ConfigError


def random_image(size=16, seed=0):
  """A random image `[size, size, 3]` with 256 levels, as floats in [0, 1]."""
  x = np.random.default_rng(seed).integers(0, 256, (size, size, 3))
  return (x / 255).astype(np.float32)


def draw_views(view1, image, n=4000, size=8, view2='', count=2):
  """`[n, count, size, size, 3]`: views of `n` copies of an image."""
  x = jnp.broadcast_to(jnp.asarray(image), (n, *image.shape))
  config = types.SimpleNamespace(view1=view1, view2=view2, ops='')
  draw = jax.jit(lambda x, e, p: augment.views(x, e, p, augment.pipelines(config, count), 0, size))
  return np.asarray(draw(x, jnp.zeros(n, jnp.int32), jnp.arange(n, dtype=jnp.int32)))


def draw_op(name, image, n, **arguments):
  """The results of an op for `n` keys, `[n, h, w, 3]`, and the keys."""
  keys = jax.random.split(jax.random.key(2), n)
  op = ops.OPS[name].function
  draw = jax.jit(jax.vmap(lambda k: op(k, jnp.asarray(image), image.shape[0], **arguments)))
  return np.asarray(draw(keys)), keys


# Parsing.


def test_parse():
  """Breaks if positional or named arguments, defaults or joined pipelines are parsed wrongly."""
  crop, jitter, flip, gray = augment.parse(
    'simclr_crop(0.08, area_max=1) | simclr_jitter(0.5, p=0.8) | flip | grayscale(p=0.25)'
  )
  assert crop.arguments == {'area_min': 0.08, 'area_max': 1, 'min_object_covered': 0.1}
  assert (jitter.arguments, jitter.p) == ({'strength': 0.5, 'brightness': 'multiplicative'}, 0.8)
  assert [(op.name, op.arguments, op.p) for op in (flip, gray)] == [
    ('flip', {}, 0.5),
    ('grayscale', {}, 0.25),
  ]
  longer = augment.parse(' supervised|solarize(p=0.2) ')
  assert longer[:2] == augment.parse('supervised') and longer[2].arguments == {'threshold': 0.5}
  assert augment.parse('moco_v2') is augment.parse('moco_v2')


@pytest.mark.parametrize(
  'text, message',
  [
    ('', "'' is not a pipeline: write ops joined by |, such as 'simclr_crop(0.08, 1) | flip'"),
    ('resize | ', "'resize | ' is not a pipeline: write ops joined by |"),
    ('resize' + ' | flip' * 9999, 'is not a pipeline'),
    ('resize, flip', "'(resize, flip)' is not an op: write name or name(arguments)"),
    ('resize | 3', "'3' is not an op: write name or name(arguments)"),
    ('resize | os.getcwd()', "'os.getcwd()' is not an op: write name or name(arguments)"),
    ('moco_v3', "moco_v3 is neither an op nor a published pipeline, did you mean 'moco_v2'?"),
    (
      'resize | greyscale(p=0.2)',
      "greyscale is neither an op nor a published pipeline, did you mean 'grayscale'?",
    ),
    (
      'resize | xyz',
      'xyz is neither an op nor a published pipeline; available: simclr_crop, torch_',
    ),
    ('moco_v2(p=0.5)', 'moco_v2 is neither an op'),
    (
      'flip',
      "the pipeline 'flip' does not start with an op that sets the size: simclr_crop, torch_",
    ),
    ('torch_crop(0.2)', "torch_crop(0.2): missing a required argument: 'area_max'; it takes area_"),
    (
      'resize | flip(p=1, q=2)',
      "flip(p=1, q=2): got an unexpected keyword argument 'q'; it takes p",
    ),
    ('resize | flip(1)', 'flip(1): too many positional arguments; it takes p'),
    ('resize(p=0.5)', "resize(p=0.5): got an unexpected keyword argument 'p'; it takes none"),
    ('resize | noise(exit())', 'noise(exit()): arguments must be numbers or strings'),
    ('resize | noise("a lot")', "noise: std='a lot' is not a number"),
    ('resize | noise(True)', 'noise: std=True is not a number'),
    ('resize | noise(2)', 'noise: std=2 is out of range: from 0.0 to 1.0'),
    ('resize | flip(p=1.5)', 'flip: p=1.5 is out of range: from 0.0 to 1.0'),
    ('resize | noise(1e999)', 'noise: std=inf is not a finite number'),
    ('resize | simclr_blur(per="run")', "simclr_blur: per='run' is not one of example, batch"),
    ('torch_crop(0.5, 0.2)', 'torch_crop: area_max=0.2 is below its lower bound, 0.5'),
    ('resize | torch_blur(2, 1)', 'torch_blur: sigma_max=1 is below its lower bound, 2'),
  ],
)
def test_errors_in_pipelines_are_one_sentence(text, message):
  """Breaks if a mistake in a pipeline is accepted, or the message is not one line that names it."""
  with pytest.raises(ValueError) as error:
    augment.parse(text)
  assert message in str(error.value)
  assert '\n' not in str(error.value)


def test_random_ops_are_refused_in_evaluations():
  """Breaks if the pipeline of an evaluation may be random."""
  for text in ('supervised', 'resize | flip', 'resize | grayscale(p=0.5)', 'resize | noise(0.1)'):
    with pytest.raises(ValueError, match='is for evaluation but .* is random$'):
      augment.parse(text, random=False)
    assert augment.parse(text)
  for text in ('simclr_eval', 'moco_eval', 'resize | grayscale | flip(p=1)'):
    x = random_image(24)
    assert augment.eval_view(jnp.asarray(x), text, 16).shape == (16, 16, 3)


def test_every_op_declares_its_arguments():
  """Breaks if an op's arguments have no allowed values, a default is not allowed, or `draws` is wrong."""
  for name, definition in ops.OPS.items():
    parameters = list(inspect.signature(definition.function).parameters.values())
    first = ['key', 'height', 'width', 'size'] if definition.sized else ['key', 'image', 'size']
    assert [p.name for p in parameters[: len(first)]] == first, name
    parameters = parameters[len(first) :]
    assert parameters == definition.parameters
    assert [p.name for p in parameters] == list(definition.allowed), name
    assert definition.function.__doc__, name
    assert name not in augment.PIPELINES
    needed = ', '.join('0.5' for p in parameters if p.default is p.empty)
    op = f'{name}({needed})' if definition.sized else f'resize | {name}({needed}, p=0.5)'
    assert augment.parse(op.replace('(, ', '('))[-1].name == name
    assert definition.draws == ('key' in inspect.getsource(definition.function).split('"""')[2]), (
      name
    )


# (op, arguments, probability) in the released code of SimCLR and MoCo, in order.
SIMCLR_CROP = ('simclr_crop', [0.08, 1, 0.1], 1)
FLIP, GRAY = ('flip', [], 0.5), ('grayscale', [], 0.2)
SIMCLR_BLUR = ('simclr_blur', ['batch'], 0.5)
MOCO_V2_COLOUR = [('torch_jitter', [0.4, 0.4, 0.4, 0.1], 0.8), GRAY]
REFERENCES = {
  'simclr_v1': [SIMCLR_CROP, FLIP, ('simclr_jitter', [1, 'additive'], 0.8), GRAY, SIMCLR_BLUR],
  'simclr_v2': [SIMCLR_CROP, FLIP, ('simclr_jitter', [1, 'multiplicative'], 0.8), GRAY, SIMCLR_BLUR],
  'simclr_cifar10_v1': [SIMCLR_CROP, FLIP, ('simclr_jitter', [0.5, 'additive'], 0.8), GRAY],
  'simclr_cifar10_v2': [SIMCLR_CROP, FLIP, ('simclr_jitter', [0.5, 'multiplicative'], 0.8), GRAY],
  'moco_v1': [('torch_crop', [0.2, 1], 1), GRAY, ('torch_jitter', [0.4, 0.4, 0.4, 0.4], 1), FLIP],
  'moco_v2': [('torch_crop', [0.2, 1], 1), *MOCO_V2_COLOUR, ('torch_blur', [0.1, 2], 0.5), FLIP],
  'moco_cifar10': [('torch_crop', [0.08, 1], 1), FLIP, *MOCO_V2_COLOUR],
  'supervised': [SIMCLR_CROP, FLIP],
  'simclr_eval': [('center_crop', [0.875], 1)],
  'moco_eval': [('torch_center_crop', [0.875], 1)],
}  # fmt: skip


def test_published_pipelines():
  """Breaks if an op, its position or a constant of a published pipeline changes."""
  pipelines = {
    name: [(op.name, list(op.arguments.values()), op.p) for op in augment.parse(name)]
    for name in augment.PIPELINES
    if name != 'crop_flip_blur'  # not published
  }
  assert pipelines == REFERENCES


# Ops in a file of the user.

OPS = """
import jax
import jax.numpy as jnp

from simclr_jax.data import crop
from simclr_jax.data.ops import op
from simclr_jax.validation import Choices, Range


@op('triangle', side=Range(0.1, 1.0))
def corner(key, height, width, size, side=0.5):
  length = side * jnp.minimum(height, width)
  return jnp.stack([0.0, 0.0, length, length])


@op(draws=True, low=Range(0.0, 1.0), channels=Choices('all', 'red'))
def darken(key, image, size, low, channels='all'):
  factor = jax.random.uniform(key, minval=low)
  return image * (factor if channels == 'all' else jnp.array([factor, 1.0, 1.0]))
"""


@pytest.fixture
def own_ops(tmp_path):
  """The path of a file with the ops `corner`, which sets the size, and `darken`."""
  path = tmp_path / 'my_ops.py'
  path.write_text(OPS)
  return str(path)


def test_parse_own_ops(own_ops):
  """Breaks if ops of a file cannot be combined with built-in ops, or are known without the file."""
  text = augment.with_ops('corner | darken(0.5, p=0.3) | flip', own_ops)
  assert augment.split_ops(text) == (own_ops, 'corner | darken(0.5, p=0.3) | flip')
  corner, darken, flip = augment.parse(text)
  assert (corner.arguments, corner.p, corner.kernel) == ({'side': 0.5}, 1, 'triangle')
  assert (darken.arguments, darken.p) == ({'low': 0.5, 'channels': 'all'}, 0.3)
  assert darken.random and not corner.random and flip.definition is ops.OPS['flip']
  published = augment.parse(augment.with_ops('supervised | darken(0)', own_ops))
  assert published[:2] == augment.parse('supervised') and published[2].name == 'darken'
  assert augment.with_ops('resize', '') == 'resize' and augment.with_ops('', own_ops) == ''
  assert augment.split_ops('resize | flip') == ('', 'resize | flip')
  with pytest.raises(ConfigError, match='^darken is neither an op nor a published pipeline'):
    augment.parse('resize | darken(0.5)')


@pytest.mark.parametrize(
  'pipeline, message',
  [
    ('resize | darken(2)', 'darken: low=2 is out of range: from 0.0 to 1.0'),
    ('resize | darken(0, "blue")', "darken: channels='blue' is not one of all, red"),
    ('resize | darken', "darken(): missing a required argument: 'low'; it takes low, channels, p"),
    ('corner(0.05)', 'corner: side=0.05 is out of range: from 0.1 to 1.0'),
    ('corner(p=0.5)', "corner(p=0.5): got an unexpected keyword argument 'p'; it takes side"),
    ('darken(0)', 'does not start with an op that sets the size: simclr_crop, torch_crop, center_'),
    (
      'resize | darkn(0.5)',
      "darkn is neither an op nor a published pipeline, did you mean 'darken'?",
    ),
  ],
)
def test_errors_in_pipelines_of_own_ops_are_one_sentence(own_ops, pipeline, message):
  """Breaks if arguments of own ops are not checked, or a message is not one line that names the mistake."""
  with pytest.raises(ConfigError) as error:
    augment.parse(augment.with_ops(pipeline, own_ops))
  assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
  'contents, message',
  [
    (None, 'the ops file {path} cannot be read: No such file or directory'),
    ('', '{path} has no ops: decorate functions with simclr_jax.data.ops.op'),
    ('def flop(key, image, size):\n  return image\n', '{path} has no ops: decorate functions with'),
    (
      'import no_such_module',
      "the ops {path} fails: ModuleNotFoundError: No module named 'no_such_",
    ),
    ('def flop(:', 'the ops {path} fails: SyntaxError: '),
    (
      'from simclr_jax.data.ops import op\n@op()\ndef dim(key, image, size, low):\n  return image\n',
      'the op dim takes (low), but its decorator has ranges or choices for ()',
    ),
  ],
)
def test_errors_in_files_of_own_ops_are_one_sentence(tmp_path, contents, message):
  """Breaks if a missing, empty or failing file of ops causes a traceback."""
  path = tmp_path / 'my_ops.py'
  if contents is not None:
    path.write_text(contents)
  with pytest.raises(ConfigError) as error:
    augment.parse(augment.with_ops('resize | dim(0.5)', str(path)))
  assert message.format(path=path) in str(error.value) and '\n' not in str(error.value)


def test_views_of_own_ops(own_ops):
  """Breaks if `views` ignores the file, arguments or probability of own ops, or its keys differ."""
  config = types.SimpleNamespace(
    view1='resize | darken(0.5, "red", p=0.5)', view2='corner', ops=own_ops
  )
  pipelines = augment.pipelines(config, 2)
  image, n = random_image(8), 2000
  draw = jax.jit(lambda x, e, p: augment.views(x, e, p, pipelines, 0, 4))
  x = jnp.broadcast_to(image, (n, 8, 8, 3))
  views = np.asarray(draw(x, jnp.zeros(n, jnp.int32), jnp.arange(n, dtype=jnp.int32)))
  # Half of the image has the size of the view, so it is not resized.
  np.testing.assert_allclose(views[:, 1], np.broadcast_to(image[:4, :4], (n, 4, 4, 3)), atol=1e-6)
  plain = np.asarray(augment.eval_view(jnp.asarray(image), 'resize', 4))
  factor = views[:, 0, :, :, 0].mean((1, 2)) / plain[..., 0].mean()
  np.testing.assert_allclose(views[:, 0, :, :, 0], factor[:, None, None] * plain[..., 0], atol=1e-5)
  np.testing.assert_allclose(
    views[:, 0, ..., 1:], np.broadcast_to(plain[..., 1:], (n, 4, 4, 2)), atol=1e-6
  )
  darkened = factor < 1 - 1e-6
  np.testing.assert_allclose(darkened.mean(), 0.5, atol=0.04)
  quantiles = np.quantile(factor[darkened], [0, 0.25, 0.5, 0.75, 1])
  np.testing.assert_allclose(quantiles, [0.5, 0.625, 0.75, 0.875, 1], atol=0.04)


def test_places_of_own_ops(own_ops):
  """Breaks if the host does not read the region that an own op crops, or views of it differ."""
  pipelines = tuple(augment.with_ops(p, own_ops) for p in ('corner(0.5)', 'corner(0.5) | flip'))
  zeros, position = np.zeros(3, np.int32), np.arange(3, dtype=np.int32)
  height, width = np.array([8, 30, 4]), np.array([12, 20, 4])
  crops = np.asarray(
    augment.places(height, width, zeros, position, pipelines=pipelines, seed=0, size=4)
  )
  corners = [[[0, 0, 4, 4]] * 2, [[0, 0, 10, 10]] * 2]
  np.testing.assert_array_equal(crops[:2, 0], corners)
  np.testing.assert_array_equal(
    crops[2, :, 0], [[0, 0, 4, 4], [0, 0, 2, 2]]
  )  # no crop in eval_view
  whole = random_image(20)[None, :, :20]
  window = whole[:, :10, :10]  # what the host decodes
  place = augment.places(
    np.array([20]), np.array([20]), zeros[:1], position[:1], pipelines=pipelines, seed=0, size=4
  )
  draw = jax.jit(lambda x, c: augment.views(x, zeros[:1], position[:1], pipelines, 0, 4, c))
  np.testing.assert_allclose(draw(window, place), draw(whole, None), atol=1e-6)


# Random draws.


def chi2(counts):
  """Pearson's statistic against equal counts."""
  expected = np.mean(counts)
  return ((np.asarray(counts) - expected) ** 2 / expected).sum()


def test_simclr_jitter_factors_and_order():
  """Breaks if the range of a factor, the uniformity of the 24 orders, or the clip after each op changes."""
  tf = pytest.importorskip('tensorflow', reason='tf.image is the oracle')
  strength, image = 0.5, np.random.default_rng(0).random((16, 16, 3)).astype(np.float32)
  results, _ = draw_op('simclr_jitter', image, 300, strength=strength)
  keys = jax.random.split(jax.random.key(2), 12_000)  # starts with the keys of `results`
  assert results.min() >= 0 and results.max() <= 1

  order = jax.jit(jax.vmap(lambda k: jax.random.permutation(jax.random.split(k, 5)[0], 4)))
  orders = np.asarray(order(keys))
  counts = [(orders == p).all(1).sum() for p in itertools.permutations(range(4))]
  assert sum(counts) == len(keys)
  assert chi2(counts) < 49.7  # 99.9 % quantile, 23 degrees of freedom

  # One image at a time, with tf.image and the same draws.
  for key, x, order in zip(keys[:40], results, orders):
    _, *rest = jax.random.split(key, 5)
    low = [0.6, 0.6, 0.6, -0.1]
    high = [1.4, 1.4, 1.4, 0.1]
    factors = [float(jax.random.uniform(k, minval=u, maxval=v)) for k, u, v in zip(rest, low, high)]
    expected = image
    steps = [tf.multiply, tf.image.adjust_contrast, tf.image.adjust_saturation, tf.image.adjust_hue]
    for op in order:
      expected = np.clip(steps[op](expected, factors[op]), 0, 1)
    np.testing.assert_allclose(x, expected, atol=1e-5)


def test_additive_brightness_of_v1():
  """Breaks if the brightness of v1 is not a shift by up to 0.8 times the strength."""
  gray = np.full((4, 4, 3), 0.5, np.float32)  # contrast, saturation and hue do not change it
  out, _ = draw_op('simclr_jitter', gray, 4000, strength=0.5, brightness='additive')
  shift = out[:, 0, 0, 0] - 0.5
  np.testing.assert_allclose([shift.min(), shift.max()], [-0.4, 0.4], atol=0.01)
  np.testing.assert_allclose([shift.mean(), shift.std()], [0, 0.8 / 12**0.5], atol=0.012)
  out, _ = draw_op('simclr_jitter', gray, 2000, strength=0.5)
  factor = out[:, 0, 0, 0] / 0.5
  np.testing.assert_allclose([factor.min(), factor.max()], [0.6, 1.4], atol=0.01)


@pytest.mark.parametrize('enhancer', ['Brightness', 'Contrast', 'Color'])
def test_torch_jitter_equals_pillow(enhancer):
  """Breaks if an image is not blended with the same image as in Pillow, or the range of the factor changes."""
  image = random_image(32)
  names = {'Brightness': 'brightness', 'Contrast': 'contrast', 'Color': 'saturation'}
  strengths = dict.fromkeys([*names.values(), 'hue'], 0)
  strengths[names[enhancer]] = 0.4
  out, keys = draw_op('torch_jitter', image, 300, **strengths)
  draw = jax.jit(jax.vmap(lambda k: jax.random.uniform(jax.random.split(k, 3)[1], (3,))))
  factors = 0.6 + 0.8 * np.asarray(draw(keys))[:, list(names).index(enhancer)]
  enhance = getattr(ImageEnhance, enhancer)(Image.fromarray(np.round(255 * image).astype(np.uint8)))
  for x, factor in zip(out[:50], factors):
    off = 255 * x - np.asarray(enhance.enhance(float(factor)))
    # Pillow rounds down at the end, and rounds the gray image to integers.
    assert off.min() > -0.3 and off.max() < 1.3


def test_torch_jitter_hue_and_order():
  """Breaks if the range of the hue or the order of the four ops differs from torchvision."""
  image = random_image(16)
  out, keys = draw_op('torch_jitter', image, 300, brightness=0, contrast=0, saturation=0, hue=0.1)
  draw = jax.vmap(lambda k: jax.random.uniform(jax.random.split(k, 3)[2], minval=-0.1, maxval=0.1))
  expected = jax.jit(jax.vmap(pixels.pillow_hue, (None, 0)))(jnp.asarray(image), draw(keys))
  np.testing.assert_allclose(out, expected, atol=1e-6)
  # On a black and white image, brightness and contrast with factors 0..3 do not commute.
  image = np.zeros((4, 4, 3), np.float32)
  image[:2] = 1.0
  out, keys = draw_op('torch_jitter', image, 600, brightness=2, contrast=2, saturation=0, hue=0)
  draw = jax.vmap(lambda k: jax.random.permutation(jax.random.split(k, 3)[0], 4))
  orders = np.asarray(jax.jit(draw)(keys))
  brightness_first = np.argmax(orders == 0, 1) < np.argmax(orders == 1, 1)
  assert 0.4 < brightness_first.mean() < 0.6
  draw = jax.vmap(lambda k: jax.random.uniform(jax.random.split(k, 3)[1], (3,)))
  b, c, _ = 3 * np.asarray(jax.jit(draw)(keys)).T  # from 0 and not from 1 - 2
  white = np.minimum(b, 1)
  squeezed = np.clip(white / 2 + white / 2 * c, 0, 1)
  white = np.clip(np.clip(0.5 + 0.5 * c, 0, 1) * b, 0, 1)
  expected = np.where(brightness_first, squeezed, white)
  np.testing.assert_allclose(out[:, 0, 0, 0], expected, atol=1e-4)
  assert np.abs(squeezed - white).max() > 0.3  # the orders differ


def test_flip_colour_and_gray_frequencies():
  """Breaks if the probabilities differ from 1/2, 4/5 and 1/5, or the views of an image are correlated."""
  image = random_image(8)
  only_flip = draw_views('resize | flip', image)  # [n, 2, 8, 8, 3]
  flipped = np.abs(only_flip - image[:, ::-1]).max((2, 3, 4)) < 1e-5
  plain = np.abs(only_flip - image).max((2, 3, 4)) < 1e-5
  assert (flipped ^ plain).all()
  np.testing.assert_allclose(flipped.mean(0), 0.5, atol=0.03)
  assert abs(np.corrcoef(flipped.T)[0, 1]) < 0.06

  changed = draw_views(
    'resize | simclr_jitter(0.5, p=0.8)', image, view2='resize | noise(1, p=0.8)'
  )
  changed = np.abs(changed - image).max((2, 3, 4)) > 1e-4
  np.testing.assert_allclose(changed.mean(0), 0.8, atol=0.03)

  both = draw_views('resize | grayscale(p=0.2) | solarize(p=0.2)', image)
  gray = np.abs(both - both[..., :1]).max((2, 3, 4)) < 1e-5
  np.testing.assert_allclose(gray.mean(0), 0.2, atol=0.03)
  unlike = np.abs(both - np.where(gray[..., None, None, None], pixels.grayscale(image), image))
  solarized = unlike.max((2, 3, 4)) > 1e-4
  np.testing.assert_allclose(solarized.mean(0), 0.2, atol=0.03)
  assert abs(np.corrcoef(gray[:, 0], solarized[:, 0])[0, 1]) < 0.06  # ops do not share a draw


def test_blur_sigma_per_example_or_batch():
  """Breaks if sigma is not U(0.1, 2), or is not shared by the images of a batch with per='batch'."""
  image = np.zeros((32, 32, 3), np.float32)
  image[16, 16] = 1.0
  centre = draw_views('resize | simclr_blur', image, 3000, 32)[:, :, 16, 16, 0]
  visible = centre < 0.999
  # The centre keeps 1 / (1 + 2 exp(-1 / 2 sigma^2))^2.
  side = (1 / np.sqrt(np.where(visible, centre, 0.25)) - 1) / 2
  sigma = np.sqrt(-1 / (2 * np.log(side)))
  np.testing.assert_allclose([sigma[visible].max()], [2.0], atol=0.01)
  np.testing.assert_allclose(np.median(np.where(visible, sigma, 0.1)), 1.05, atol=0.05)
  shared = draw_views('resize | simclr_blur("batch")', image, 50, 32)[:, :, 16, 16, 0]
  np.testing.assert_allclose(shared, np.broadcast_to(shared[:1], shared.shape), atol=1e-6)
  assert shared[0, 0] != shared[0, 1]
  some = draw_views('resize | simclr_blur(p=0.5)', image, 3000, 32)[:, :, 16, 16, 0]
  expected = 0.5 * visible.mean()
  np.testing.assert_allclose((some < 0.999).mean(), expected, atol=0.03)
  # The blur is applied to half of the images, with one sigma.
  some = draw_views('resize | simclr_blur("batch", p=0.5)', image, 3000, 32)[:, 0, 16, 16, 0]
  np.testing.assert_allclose((some < 0.999).mean(), 0.5, atol=0.04)
  assert len(np.unique(np.round(some, 5))) == 2


def test_torch_blur_sigma():
  """Breaks if the sigma of MoCo's blur is not uniform in the range of its arguments."""
  image = np.zeros((32, 32, 3), np.float32)
  image[16, 16] = 1.0
  out, _ = draw_op('torch_blur', image, 2000, sigma_min=1.0, sigma_max=2.0)
  sigma = 1 / np.sqrt(2 * np.pi * out[:, 16, 16, 0])  # a wide Gaussian's height
  quantiles = np.quantile(sigma, [0, 0.25, 0.5, 0.75, 1])
  np.testing.assert_allclose(quantiles, [1, 1.25, 1.5, 1.75, 2], atol=0.04)


def test_rotate_cutout_and_noise():
  """Breaks if rotations are not equally likely, or the square or the noise has another size or position."""
  image = random_image(8)
  out, _ = draw_op('rotate', image, 4000)
  quarters = np.stack([np.rot90(image, i) for i in range(4)])
  counts = (out[:, None] == quarters).all((2, 3, 4)).sum(0)
  assert counts.sum() == 4000
  assert chi2(counts) < 16.3  # 99.9 % quantile, 3 degrees of freedom

  out, _ = draw_op('cutout', np.ones((8, 8, 3), np.float32), 4000, fraction=0.5)
  black = (out == 0).all(-1)
  assert black.sum((1, 2)).max() == 16  # 4 x 4 if the whole square is inside
  cases = [
    (black.any(2)[:, i]).mean() for i in range(8)
  ]  # fraction of the squares that include row i
  reach = [sum(c - 2 <= i < c + 2 for c in range(8)) / 8 for i in range(8)]
  np.testing.assert_allclose(cases, reach, atol=0.03)

  out, _ = draw_op('noise', np.full((8, 8, 3), 0.5, np.float32), 500, std=0.1)
  np.testing.assert_allclose([out.mean(), out.std()], [0.5, 0.1], atol=2e-3)
  assert len(np.unique(out[0])) > 100  # independent values


# Views.


def test_views_have_separate_pipelines():
  """Breaks if an op changes the other view, or the draws of the second view depend on the first pipeline."""
  image = random_image(8)
  pair = draw_views('resize | solarize', image, 20, view2='resize')
  np.testing.assert_allclose(pair[:, 1], np.broadcast_to(image, pair[:, 1].shape), atol=1e-6)
  np.testing.assert_allclose(pair[:, 0], np.where(pair[:, 1] < 0.5, pair[:, 1], 1 - pair[:, 1]))
  crop = 'simclr_crop(0.2, 1) | flip'
  both = draw_views(crop, image, 20)
  other = draw_views(f'{crop} | noise(0.2)', image, 20, view2=crop)
  np.testing.assert_allclose(other[:, 1], both[:, 1], atol=1e-6)
  assert np.abs(other[:, 0] - both[:, 0]).max((1, 2, 3)).min() > 0.1
  one = draw_views(crop, image, 20, count=1)
  assert one.shape == (20, 1, 8, 8, 3)
  np.testing.assert_allclose(one[:, 0], both[:, 0], atol=1e-6)


@pytest.mark.parametrize('pipeline', ['simclr_cifar10_v1 | simclr_blur(p=0.5)', 'moco_v2'])
def test_views_depend_on_seed_epoch_and_position_alone(pipeline):
  """Breaks if a view depends on its batch, or is equal in two epochs, positions or seeds."""
  config = types.SimpleNamespace(view1=pipeline, view2='', ops='')
  x = jnp.stack([jnp.asarray(random_image(20, seed)) for seed in range(16)])
  compiled = jax.jit(
    lambda x, e, p, seed: augment.views(x, e, p, augment.pipelines(config, 2), seed, 16)
  )

  def draw(x, epoch, position, seed=0):
    return compiled(x, epoch, position, seed)

  epoch, position = jnp.zeros(16, jnp.int32), jnp.arange(100, 116, dtype=jnp.int32)
  all_at_once = np.asarray(draw(x, epoch, position))
  assert all_at_once.shape == (16, 2, 16, 16, 3) and all_at_once.dtype == np.float32
  order = np.random.default_rng(0).permutation(16)
  np.testing.assert_array_equal(draw(x[order], epoch, position[order]), all_at_once[order])
  assert np.abs(np.asarray(draw(x, epoch + 1, position)) - all_at_once).max((1, 2, 3, 4)).min() > 0
  assert np.abs(np.asarray(draw(x, epoch, position + 1)) - all_at_once).max((1, 2, 3, 4)).min() > 0
  other = draw(x, epoch, position, 1)
  assert np.abs(np.asarray(other) - all_at_once).max((1, 2, 3, 4)).min() > 0
  assert np.abs(all_at_once[:, 0] - all_at_once[:, 1]).max((1, 2, 3)).min() > 0
  assert all_at_once.min() >= 0 and all_at_once.max() <= 1


def test_values_are_clipped_where_simclrs_code_clips_them():
  """Breaks if bicubic overshoot is clipped before the colour ops, or is not clipped before other ops."""
  step = np.zeros((8, 8, 3), np.float32)
  step[:, 4:] = 1.0
  raw = crop.crop_and_resize(jnp.asarray(step), ops.center_crop(None, 8, 8, 16, 1.0), 16)
  assert raw.min() < -0.05 and raw.max() > 1.05

  def view(text):
    return np.asarray(augment.view(jax.random.key(0), jnp.asarray(step), text, 16))

  jittered = view('center_crop(1.0) | simclr_jitter(0.5)')
  key = jax.random.split(jax.random.key(0), (2, 2))[1, 1]
  np.testing.assert_allclose(jittered, ops.simclr_jitter(key, raw, 16, 0.5), atol=1e-6)
  blurred = view('center_crop(1.0) | torch_blur(1, 1)')
  expected = pixels.gaussian_blur(jnp.clip(raw, 0, 1), 1.0, 4, 'edge')
  np.testing.assert_allclose(blurred, expected, atol=1e-6)


def test_bytes_and_floats():
  """Breaks if uint8 images are not divided by 255."""
  x = random_image(16)
  u = np.round(255 * x).astype(np.uint8)
  for image in (x, u):
    view = augment.view(jax.random.key(3), jnp.asarray(image), 'resize', 16)
    np.testing.assert_allclose(view, x, atol=1e-6)
