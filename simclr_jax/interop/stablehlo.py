"""Format StableHLO: a program of `jax.export`, which runs without this package, with the weights beside it."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors import numpy as safetensors

from simclr_jax.errors import ConfigError
from simclr_jax.interop.model import Model, check_weights, flat
from simclr_jax.runtime import files
from simclr_jax.runtime.text import printable

PyTree = Any
READER = 'jax.export'
PLATFORMS = ('cpu', 'cuda', 'tpu')
PROGRAM, WEIGHTS = 'model.stablehlo', 'weights.safetensors'
LOAD = '''"""Loads the network: `model = load()`, `model(images)`. Needs jax and safetensors."""

import pathlib

import jax
from jax import export
from safetensors.numpy import load_file


def load(folder=pathlib.Path(__file__).parent):
  """Images float32 [n, h, w, c] in [0, 1] -> a dict of arrays; the mean and deviation are inside."""
  program = export.deserialize(bytearray((folder / 'model.stablehlo').read_bytes()))
  variables = {}
  for path, x in load_file(folder / 'weights.safetensors').items():
    *keys, leaf = path.split('/')
    place = variables
    for key in keys:
      place = place.setdefault(key, {})
    place[leaf] = x
  return jax.jit(lambda images: program.call(variables, images))
'''


def check(model: Model) -> None:
  """Every network can be written."""


def needs(model: Model) -> str:
  """What loads the folder, in one line."""
  return 'load.py loads the program; it needs jax and safetensors. JAX reads programs that are up to six months old'


def program(model: Model) -> tuple[export.Exported, bool]:
  """The program of a network for all platforms, in full precision, with any number of images.

  Returns:
    The program, `(variables, images [n, h, w, c]) -> outputs`, and whether it takes images of any size: an encoder of the
    user's own may need a fixed size, that of the recipe.

  Raises:
    ConfigError: an encoder of the user's own needs a fixed number of images.
  """
  a = model.architecture
  specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.variables)
  make = export.export(jax.jit(model.forward()), platforms=PLATFORMS)

  def of_shape(height, width):
    shape = export.symbolic_shape(f'n, {height}, {width}, {a.get("channels", 3)}')
    with jax.default_matmul_precision('highest'):
      return make(specs, jax.ShapeDtypeStruct(shape, jnp.float32))

  if not a['encoder']:
    return of_shape('h', 'w'), True
  for size, any_size in ((('h', 'w'), True), ((a['image_size'],) * 2, False)):
    try:
      return of_shape(*size), any_size
    except Exception as failure:  # the user's code may raise anything where a size is unknown
      reason = printable(f'{type(failure).__name__}: {failure}'.split('\n')[0])[:200]
  raise ConfigError(
    f'{a["encoder"]} cannot be exported for any number of images ({reason}): write x.shape[0] instead of len(x)'
  )


def write(model: Model, folder: pathlib.Path) -> bool:
  """Writes the files of a network into a folder; returns whether the network takes images of any size."""
  exported, any_size = program(model)
  weights = safetensors.save(flat(model.variables))
  for name, content in ((PROGRAM, exported.serialize()), (WEIGHTS, weights)):
    with files.atomic(folder / name) as file:
      file.write(content)
  files.write_text(folder / 'load.py', LOAD)
  return any_size


def read(model: Model, folder: pathlib.Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
  """A function from images `[n, h, w, c]` in [0, 1] to the outputs, computed from the files alone."""
  exported = export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
  weights = safetensors.load_file(folder / WEIGHTS)
  variables: dict[str, Any] = {}
  check_weights(weights, flat(model.variables))
  for path, x in weights.items():
    *keys, leaf = path.split('/')
    place = variables
    for key in keys:
      place = place.setdefault(key, {})
    place[leaf] = x
  return lambda x: jax.device_get(exported.call(variables, x))


def usage(model: Model) -> str:
  """A program in Python that loads the files."""
  return 'from load import load\n\nmodel = load()\noutputs = model(images)  # float32 [n, h, w, c] in [0, 1]\n'


def limits(model: Model) -> list[str]:
  """Sentences about what goes wrong without an error."""
  return [
    'The mean and the standard deviation are inside the program: do not normalise the images.',
    'The program is for inference: it has no gradient.',
  ]
