"""Reads encoders from the files of weights of other programs."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax

from simclr_jax import config as recipes
from simclr_jax.encoder import Encoder
from simclr_jax.errors import ConfigError
from simclr_jax.models import mlp
from simclr_jax.runtime import environment, files, paths
from simclr_jax.runtime.text import printable
from simclr_jax.validation import did_you_mean

PyTree = Any
SIZES = {'imagenet': 224, 'strided': 64, 'cifar': 32}  # stem -> usual side of the images in pixels


@dataclasses.dataclass(frozen=True)
class Network:
  """A network that a file of weights contains.

  Attributes:
    name: how the user selects it, such as 'encoder_q'; '' if the file has one network only.
    model: the `model.*` fields that the file determines, such as `{'depth': 50, 'variant': 'torchvision'}`.
    encoder: flax variables of the encoder: `params` and `batch_stats`.
    head: flax variables of the projection head, which `model` describes (`head`, `head_layers`, ...); None without one.
    classifier: `{'kernel': [d, classes], 'bias': [classes]}`; None without one.
    normalize: `model.normalize` that belongs to the weights; None if the file does not say.
    notes: sentences about what was assumed and what was left out.
    preprocessing: fields of a recipe that the file says, `image_size` and `augment.eval`.
  """

  name: str
  model: dict[str, Any]
  encoder: PyTree
  head: PyTree | None = None
  classifier: PyTree | None = None
  normalize: str | None = None
  notes: tuple[str, ...] = ()
  preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def is_foreign(path: pathlib.Path) -> bool:
  """Whether a path is a file or a folder of weights of another program, which exists."""
  if paths.is_remote(path):
    return False
  if path.is_dir():
    names = os.listdir(path)
    return 'encoder.json' not in names and any(
      name.endswith(('.safetensors', '.bin', '.index')) or name == 'saved_model.pb'
      for name in names
    )
  return path.is_file() or path.with_name(f'{path.name}.index').is_file()


def networks(path: pathlib.Path, given: Mapping[str, Any]) -> list[Network]:
  """All networks that a file or a folder of weights contains.

  Args:
    path: a file of PyTorch (`.pth`, `.pth.tar`, `.pt`, `.ckpt`, `.bin`) or safetensors; a folder of Hugging Face; a
      checkpoint of TensorFlow, such as `model.ckpt-225206`, or its folder; a SavedModel; a pickle of BYOL.
    given: `model.*` fields that the file does not determine, such as `{'stem': 'cifar'}`.

  Raises:
    ConfigError: the file is damaged, unsafe or of an unknown kind, or its network is none of this package.
  """
  if paths.is_remote(path):
    raise ConfigError(f'{path}: copy the weights to a local folder first')
  if not path.exists() and not is_foreign(path):
    raise ConfigError(f'{path}: no such file or folder')
  if (path / 'encoder.json').is_file():
    raise ConfigError(f'{path} is an exported encoder already: use the folder as it is')
  if path.exists() and not path.is_dir() and not path.is_file():
    raise ConfigError(f'{path} is no regular file')
  found = _reader(path).networks(path, given)
  for network in found:
    for name in ('variant', 'stem'):
      if given.get(name, network.model[name]) != network.model[name]:
        raise ConfigError(
          f'{path}: {name} is {network.model[name]}, not {given[name]}: set model.{name}={network.model[name]} (--{name})'
        )
  return found


def _reader(path) -> ModuleType:
  """The module that reads a file or a folder, by its contents. TensorFlow is imported only for its own files."""
  if _is_tensorflow(path):
    from simclr_jax.interop import tf_checkpoints

    return tf_checkpoints
  if path.suffix == '.pkl' and not _is_torch(path):
    from simclr_jax.interop import haiku

    return haiku
  from simclr_jax.interop import layouts

  return layouts


def _is_torch(path):
  """Whether a pickle is a file of `torch.save`."""
  with files.open_to_read(path) as file:
    return file.read(6).startswith((b'PK', b'\x80\x02\x8a\x0a\x6c\xfc'))


def _is_tensorflow(path):
  if path.is_dir():
    return any(
      n.endswith('.index') or n in ('checkpoint', 'saved_model.pb', 'variables')
      for n in os.listdir(path)
    )
  kinds = ('.index', '.meta', '.pb')
  return not path.is_file() or path.suffix in kinds or '.data-0' in path.name


def load(path: pathlib.Path, given: Mapping[str, Any], name: str = '') -> Network:
  """One network of a file or a folder of weights.

  Args:
    path, given: as for `networks`.
    name: the name of the network; not needed if there is only one.

  Raises:
    ConfigError: there are several networks or none of this name, or as for `networks`.
  """
  found = networks(path, given)
  names = [network.name for network in found]
  if name and names == ['']:
    raise ConfigError(
      f'{path} contains one network only: leave --network, --ema and init_network away'
    )
  if name and name not in names:
    raise ConfigError(
      f'{path} has no network {name!r}, only {", ".join(map(repr, names))}{did_you_mean(name, names)}'
    )
  if not name and len(found) > 1:
    raise ConfigError(
      f'{path} contains several networks: choose one of {", ".join(names)} with --network or init_network'
    )
  return found[names.index(name) if name else 0]


def moco_state(path: pathlib.Path, given: Mapping[str, Any]) -> dict[str, Any]:
  """The state of the training in a checkpoint of MoCo, see `layouts.moco_state`; arguments as for `networks`.

  Raises:
    ConfigError: the file has no queue or no optimizer, or as for `networks`.
  """
  from simclr_jax.interop import layouts

  state = layouts.moco_state(path, given)
  if state is None:
    raise ConfigError(
      f'init_state=true: {path} has no queue, so it is no checkpoint of a MoCo training'
    )
  return state


def encoder(
  network: Network, path: pathlib.Path, image_size: int = 0, command: str = ''
) -> Encoder:
  """The encoder of a network, as if it had been trained by this package.

  Args:
    network: of `load`.
    path: of its file, recorded in the provenance.
    image_size: side of the images in pixels; 0: as the file says, or the usual one for the stem, `SIZES`.
    command: the command line, recorded in the provenance.

  Raises:
    ConfigError: the file does not say how the images were normalised, or the architecture is not supported.
  """
  if not network.normalize:
    raise ConfigError(
      f'{path} does not say how the images were normalised: add --normalize=imagenet, cifar10 or none'
    )
  fields = {f'model.{name}': value for name, value in network.model.items()}
  usual = {'image_size': SIZES[network.model['stem']]}
  fields |= {'model.normalize': network.normalize, **usual, **network.preprocessing}
  if image_size:
    fields['image_size'] = image_size
  config = recipes.load('simclr_images', fields)
  provenance = {
    'weights': str(paths.absolute(path)), 'network': network.name, 'config': config.to_dict(),
    'versions': environment.versions(), 'command': command,
  }  # fmt: skip
  return Encoder(recipes.architecture(config), network.encoder, provenance)


def _layers(architecture):
  layers = mlp.depth(architecture)
  return f'{layers} layer{"s" * (layers > 1)}'


def describe(network: Network, encoder: Encoder) -> list[str]:
  """What was detected, assumed and left out, in sentences."""
  a = encoder.architecture
  size = sum(x.size for x in jax.tree.leaves(network.encoder['params'])) / 1e6
  width = f' x {a["width_multiplier"]:g}' if a['width_multiplier'] != 1 else ''
  kinds = ''.join(f', {text}' for text in (
    'selective kernels' * (a['sk_ratio'] > 0), 'squeeze and excitation' * (a['se_ratio'] > 0)
  ) if text)  # fmt: skip
  lines = [
    f'ResNet-{a["depth"]}{width}{kinds}, {size:.2f} million parameters, {a["stem"]} stem, variant {a["variant"]}',
    f'images: {a["image_size"]} pixels, normalised: {a["normalize"]}, preprocessed by {a["eval_view"]}',
    f'projection head: {_layers(a)}, {a["head_dim"]} dimensions'
    if network.head
    else 'projection head: none',
  ]
  if network.classifier:
    classes = len(network.classifier['bias'])
    lines.append(f'left out: the linear classifier of {classes:,} classes')
  return [printable(line) for line in (*lines, *network.notes)]
