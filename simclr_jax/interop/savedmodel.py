"""Format SavedModel: the program of JAX in a function of TensorFlow, through `jax2tf`."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from simclr_jax.errors import ConfigError
from simclr_jax.interop import stablehlo
from simclr_jax.interop.model import Model, check_weights, flat

READER = 'TensorFlow'


def check(model: Model) -> None:
  """Raises ConfigError if this version of JAX has no `jax2tf`."""
  try:
    from jax.experimental import jax2tf  # noqa: F401
  except ImportError:
    raise ConfigError(
      f'jax {jax.__version__} has no jax2tf, which --to=savedmodel needs: use --to=onnx or --to=stablehlo'
    ) from None


def needs(model: Model) -> str:
  """What loads the folder, in one line."""
  import tensorflow as tf

  return f'tf.saved_model.load(FOLDER).f(images); it needs TensorFlow {tf.__version__} or newer'


def write(model: Model, folder: pathlib.Path) -> bool:
  """Writes the files of a network into a folder; returns whether the network takes images of any size."""
  import tensorflow as tf
  from jax.experimental import jax2tf

  _, any_size = stablehlo.program(model)
  a = model.architecture
  size = None if any_size else a['image_size']
  shape = 'n, h, w, _' if any_size else 'n, _, _, _'
  with jax.default_matmul_precision('highest'):
    f = jax2tf.convert(
      model.forward(),
      polymorphic_shapes=[None, f'({shape})'],
      with_gradient=False,
      native_serialization_platforms=stablehlo.PLATFORMS,
    )
    module = tf.Module()
    module.weights = tf.nest.map_structure(
      lambda x: tf.Variable(x, trainable=False), model.variables
    )
    images = tf.TensorSpec([None, size, size, a.get('channels', 3)], tf.float32, 'images')
    module.f = tf.function(lambda images: f(module.weights, images), autograph=False)
    signature = module.f.get_concrete_function(images)
  tf.saved_model.save(module, str(folder), signatures={'serving_default': signature})
  return any_size


def read(model: Model, folder: pathlib.Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
  """A function from images `[n, h, w, c]` in [0, 1] to the outputs, computed from the files by another library.

  The function raises ConfigError if TensorFlow is too old for this version of JAX.
  """
  import tensorflow as tf

  loaded: Any = tf.saved_model.load(str(folder))
  weights = jax.tree.map(lambda x: x.numpy(), _plain(loaded.weights))
  check_weights(flat(weights), flat(model.variables))

  def run(x):
    try:
      return {name: y.numpy() for name, y in loaded.f(tf.constant(x)).items()}
    except tf.errors.InvalidArgumentError as error:
      if 'deserialize' not in str(error):
        raise
      raise ConfigError(
        f'TensorFlow {tf.__version__} is too old for programs of jax {jax.__version__}: use --to=onnx or --to=stablehlo, '
        'or export with an older jax'
      ) from None

  return run


def _plain(tree):
  """A tree of dicts instead of TensorFlow's wrappers."""
  return {k: _plain(v) for k, v in tree.items()} if hasattr(tree, 'items') else tree


def usage(model: Model) -> str:
  """A program in Python that loads the files."""
  return (
    "import tensorflow as tf\n\nmodel = tf.saved_model.load('.')\n"
    'outputs = model.f(images)  # float32 [n, height, width, channels] in [0, 1]\n'
  )


def limits(model: Model) -> list[str]:
  """Sentences about what goes wrong without an error."""
  return [
    'The mean and the standard deviation are inside the program: do not normalise the images.',
    'The program is for inference: it has no gradient.',
  ]
