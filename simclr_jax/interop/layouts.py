"""Finds ResNets in files of PyTorch, whichever program wrote them, and turns them into networks of this package.

A file is a tree of tensors. Each tensor has a name: the keys that lead to it, joined by dots. A ResNet is recognised by
its first block, and the text before that is its prefix, such as `state_dict.module.encoder_q.`:

  torchvision, timm           layer1.0.conv1.weight
  torch.nn.Sequential         4.0.conv1.weight, where 0 is the first convolution and 1 its BatchNorm
  transformers                encoder.stages.0.layers.0.layer.0.convolution.weight
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from simclr_jax.errors import ConfigError
from simclr_jax.interop import assemble, pickles, torch_heads, torch_names
from simclr_jax.interop.weights import Network
from simclr_jax.models import resnet
from simclr_jax.runtime import files
from simclr_jax.runtime.text import printable

PyTree = Any
Tensors = dict[str, np.ndarray]

WEIGHTS = ('model.safetensors', 'pytorch_model.bin')  # in a folder of Hugging Face
TIMM = (
  r'((tv|ssl|swsl|gluon)_)?(se)?resnet(18|34|50|101|152|200)(_v1b)?'  # architectures that are ours
)
NAMED = re.compile(r'(.*\.)?layer1\.0\.conv1\.(?:conv\.)?weight')
NUMBERED = re.compile(r'(.*\.)?(\d+)\.0\.conv1\.(?:conv\.)?weight')
TRANSFORMERS = re.compile(r'(.*\.)?embedder\.embedder\.convolution\.weight')
STATE = re.compile(r'queue.*|bank|center')  # of a training, beside an encoder
# Words in prefixes that tell the networks of a file apart, and say which head belongs to which.
ROLES = {'momentum', 'ema', 'target', 'teacher', 'student', 'online', 'q', 'k', 'query', 'key'}
WRAPPERS = ('module', '_orig_mod', '_fsdp_wrapped_module')  # words in prefixes that say nothing
NETWORKS = 32  # most networks of a file
NAME = 1000  # most characters of a name
SHOWN = 20  # modules in a note
# What shapes do not say, and an export of this package does.
SAID = {
  'variant': resnet.VARIANTS, 'stem': tuple(resnet.STEMS), 'normalize': ('none', *resnet.NORMALIZE), 'features': ('z',),
}  # fmt: skip

# Names that only other networks have -> the network.
OTHERS = {
  r'.*(patch_embed|cls_token|class_token|pos_embed).*': 'a Vision Transformer',
  r'(.*\.)?stages\.\d+\.(downsample|blocks)\..*': 'a ConvNeXt or another network of timm with stages',
  r'(.*\.)?(conv_stem|blocks\.0\.0\.conv_pw)\..*': 'an EfficientNet or MobileNet',
  r'(.*\.)?features\.(denseblock1|0\.0)\..*': 'a DenseNet, MobileNet or EfficientNet',
  r'(.*\.)?features\.\d+\.weight': 'a VGG or AlexNet',
  r'(.*\.)?(trunk_output|s1\.b1)\..*': 'a RegNet',
  r'(.*\.)?layer1\.0\.(bn1|norm1|conv1)\.(IN|BN)\..*': 'an IBN-Net',
  r'(.*\.)?layer1\.0\.(convs|conv2\.conv|conv2\.fc1)\..*': 'a Res2Net, ResNeSt or SKNet of timm',
  r'(.*\.)?layer1\.0\.(conv2_offset|conv2\.conv_offset)\..*': 'a ResNet with deformable convolutions',
  r'(.*\.)?layer1\.0\.se\.(conv|fc)\..*': 'a ResNet with ECA or another attention',
  r'(.*\.)?layer1\.0\.attn.*': 'a ResNet with attention',
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _File:
  """What a file contains.

  Attributes:
    path: of the file.
    tensors: name -> array.
    tree: the object in the file.
    model: `model.*` fields that the file or its folder says, and `features`, 'z' if a linear layer is a head.
    preprocessing: as of `Network`.
  """

  path: pathlib.Path
  tensors: Tensors
  tree: Any
  model: Mapping[str, Any]
  preprocessing: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Module:
  """Tensors that belong together and to no encoder: `name` of the module, and name in the module -> array."""

  name: str
  tensors: Tensors


def networks(path: pathlib.Path, given: Mapping[str, Any]) -> list[Network]:
  """All ResNets in a file of PyTorch or safetensors, or in a folder of Hugging Face.

  Args:
    path: the file or the folder.
    given: `model.*` fields that shapes do not determine: `variant`, `stem`, `normalize`.

  Returns:
    The networks, in the order of the file.

  Raises:
    ConfigError: the file is damaged or unsafe; a network is none of this package, lacks tensors or has others; or
      `given` contradicts the shapes. One sentence.
  """
  file = _read(path, given)
  prefixes = _prefixes(file.tensors)
  if not prefixes:
    raise ConfigError(f'{path} contains no ResNet: {_described(file.tensors)}')
  if len(prefixes) > NETWORKS:
    raise ConfigError(f'{path} contains {len(prefixes):,} ResNets, more than {NETWORKS}')
  return _networks(file, prefixes, given)


def moco_state(path: pathlib.Path, given: Mapping[str, Any]) -> dict[str, Any] | None:
  """The state of the training in a checkpoint of MoCo, without its query encoder.

  Args:
    path, given: as for `networks`.

  Returns:
    `queue`, float32 `[K, d]`, one key in each row; `pointer`, the row that is replaced next; `key`, the variables of the
    key encoder, `params` and `batch_stats`, each with the keys 'encoder' and 'head'; `momentum`, the `momentum_buffer`
    of SGD for each parameter of the query encoder, with the same two keys; `epoch`, the number of finished epochs.
    None if the file has no queue.

  Raises:
    ConfigError: the file has a queue, but lacks another part; or as for `networks`.
  """
  file = _read(path, given)
  queues = [name for name in file.tensors if name.split('.')[-1] == 'queue']
  if not queues:
    return None
  found = _networks(file, _prefixes(file.tensors), given)
  query, key = (
    next((n for n in found if _role(n.name) & roles), None)
    for roles in ({'q', 'query'}, {'k', 'key'})
  )
  if query is None or key is None or query.head is None or key.head is None:
    raise ConfigError(f'{path} has a queue, but not both encoders of MoCo with their heads')
  queue, pointer = file.tensors[queues[0]], file.tensors.get(f'{queues[0]}_ptr', np.zeros(0))
  if queue.ndim != 2 or len(queue) != query.model['head_dim'] or not np.isfinite(queue).all():
    raise ConfigError(f'{path}: the queue has the shape {queue.shape} or is not finite')
  if pointer.size != 1 or not 0 <= pointer.flat[0] < queue.shape[1]:
    raise ConfigError(f'{path}: the pointer of the queue is missing or out of range')
  epoch = file.tree.get('epoch') if isinstance(file.tree, dict) else None
  if type(epoch) is not int or epoch < 0:
    raise ConfigError(f'{path} does not say the number of epochs')
  parts = {'encoder': key.encoder, 'head': key.head}
  return {
    'queue': np.ascontiguousarray(queue.T, np.float32),
    'pointer': int(pointer.flat[0]),
    'key': {
      kind: {part: tree.get(kind, {}) for part, tree in parts.items()}
      for kind in ('params', 'batch_stats')
    },
    'momentum': _momentum(file, query),
    'epoch': epoch,
  }


def _momentum(file, query) -> PyTree:
  """The buffers of SGD, which has numbered the parameters: encoder and head of the query come first."""
  optimizer = file.tree.get('optimizer')
  try:
    state, (group,) = optimizer['state'], optimizer['param_groups']
    buffers = [state.get(i, {}).get('momentum_buffer') for i in group['params']]
  except (TypeError, KeyError, ValueError, AttributeError):
    raise ConfigError(f'{file.path} has no state of SGD with one group of parameters') from None
  result = {}
  for part, tensors in (
    ('encoder', _tensors(query.model)),
    ('head', torch_names.head(assemble.architecture(query.model), assemble.features(query.model))),
  ):
    learned = [tensor for tensor in tensors if tensor.path and tensor.path[0] == 'params']
    own, buffers = buffers[: len(learned)], buffers[len(learned) :]
    values = {t.name: x for t, x in zip(learned, own) if isinstance(x, np.ndarray)}
    what = f'{file.path}, the momentum of the {part}'
    result[part] = torch_names.from_torch(learned, values, what)['params']
  return result


# Files.


def _read(path: pathlib.Path, given: Mapping[str, Any]) -> _File:
  """Reads a file, or the weights of a folder and what its other files say."""
  if path.is_dir():
    path = _weights_of_folder(path)
  metadata: dict[str, str] = {}
  if _is_safetensors(path):
    tree, metadata = pickles.read_safetensors(path)
  else:
    tree = pickles.read(path)
  tensors: Tensors = {}
  for name, array in _flat(path, tree, ''):
    if name in tensors:
      raise ConfigError(f'{path} contains {printable(name)} twice')
    tensors[name] = array
  model, preprocessing = _of_export(metadata)
  if path.name in WEIGHTS:
    of_folder, size = _of_folder(path.parent, given.get('normalize'))
    model, preprocessing = {**of_folder, **model}, {**size, **preprocessing}
  return _File(path, tensors, tree, model, preprocessing)


def _is_safetensors(path) -> bool:
  """Whether a file begins like safetensors, with a size and a JSON object; names may be wrong."""
  with pickles.open_checked(path) as file:
    start = file.read(9)
  is_torch = start.startswith((b'PK', b'\x80'))
  return start[8:] == b'{' or (path.suffix == '.safetensors' and not is_torch)


def _weights_of_folder(folder) -> pathlib.Path:
  names = sorted(entry.name for entry in folder.iterdir())
  found = [name for name in WEIGHTS if name in names][:1] or [
    name for name in names if name.endswith(('.safetensors', '.bin', '.pth', '.pt'))
  ]
  if len(found) != 1:
    if any('-of-' in name for name in found):
      raise ConfigError(f'{folder} has weights in several parts: save the model in one file first')
    kinds = f'{len(found)} files of weights: name one of them' if found else f'no {WEIGHTS[0]}'
    raise ConfigError(f'{folder} has {kinds}')
  return folder / found[0]


def _flat(path, tree, prefix) -> Iterator[tuple[str, np.ndarray]]:
  """(name, array) of every tensor in nested containers."""
  if len(prefix) > NAME:
    raise ConfigError(
      f'{path} contains a name of more than {NAME:,} characters, {printable(prefix[:80])}...'
    )
  if isinstance(tree, np.ndarray):
    yield prefix, tree
  elif isinstance(tree, (dict, list, tuple)):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
      yield from _flat(path, value, f'{prefix}.{key}' if prefix else str(key))


def _of_export(metadata) -> tuple[dict[str, Any], dict[str, Any]]:
  """`model` and `preprocessing` of a `_File`, as an export of this package to safetensors says in its metadata."""
  try:
    architecture = json.loads(metadata.get('simclr_jax', '{}'))['architecture']
    model = {
      name: architecture[name]
      for name, allowed in SAID.items()
      if architecture.get(name) in allowed
    }
    size, view = architecture['image_size'], architecture['eval_view']
    return model, {'image_size': size, 'augment.eval': view}
  except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
    return {}, {}


def _of_folder(folder, normalize) -> tuple[dict[str, Any], dict[str, Any]]:
  """`model` and `preprocessing` of a `_File`, as the JSON files in a folder of Hugging Face say; `normalize`: as given.

  Raises:
    ConfigError: the network or the preprocessing is none of this package.
  """
  config, images = (_json(folder / name) for name in ('config.json', 'preprocessor_config.json'))
  kind, architecture = config.get('model_type'), config.get('architecture')
  if kind not in (None, 'resnet', 'timm_wrapper'):
    raise ConfigError(f'{folder} contains a {printable(kind)}, not a ResNet')
  if isinstance(architecture, str) and not re.fullmatch(TIMM, architecture.split('.')[0]):
    raise ConfigError(
      f"{folder} contains timm's {printable(architecture)}, which is none of this package's networks"
    )
  other = {
    'downsample_in_bottleneck': False,
    'downsample_in_first_stage': False,
    'hidden_act': 'relu',
  }
  for name, value in other.items():
    if kind == 'resnet' and config.get(name, value) != value:
      raise ConfigError(
        f'{folder}/config.json: {name} is {printable(config[name])}, this package has only {value}'
      )
  about = config.get('pretrained_cfg')
  if isinstance(about, dict) and 'mean' in about:
    size = about.get('input_size')
    sides = {n for n in size[1:] if type(n) is int} if isinstance(size, list) else set()
    found = {'normalize': normalize or _normalization(folder, about.get('mean'), about.get('std'))}
    return found, {'image_size': sides.pop()} if len(sides) == 1 else {}
  if normalize:
    return {'normalize': normalize}, {}
  if images.get('do_normalize') is False:
    return {'normalize': 'none'}, {}
  if 'image_mean' in images:
    return {'normalize': _normalization(folder, images['image_mean'], images.get('image_std'))}, {}
  return {}, {}


def _json(path):
  try:
    found = files.read_json(path)
  except FileNotFoundError:
    return {}
  if not isinstance(found, dict):
    raise ConfigError(f'{path} is damaged: it is no object')
  return found


def _normalization(folder, mean, std) -> str:
  """The value of `model.normalize` that means this mean and standard deviation."""
  known = {**resnet.NORMALIZE, 'none': ((0, 0, 0), (1, 1, 1))}
  try:
    found = np.array((mean, std), float)
  except (ValueError, TypeError):
    found = np.zeros(0)
  for name, values in known.items():
    if found.shape == (2, 3) and np.allclose(found, values, atol=1e-3):
      return name
  shown = printable(f'{mean} and standard deviation {std}')[:200]
  raise ConfigError(
    f'{folder}: the images were normalised with mean {shown}, which is none of {", ".join(known)}: --normalize chooses one'
  )


def _described(tensors) -> str:
  """What a file without a ResNet contains."""
  for pattern, kind in OTHERS.items():
    if any(re.fullmatch(pattern, name) for name in tensors):
      return f'its names are those of {kind}'
  if not tensors:
    return 'there are no tensors'
  names = [printable(name)[:80] or 'one without a name' for name in list(tensors)[:3]]
  return f'its tensors are {", ".join(names)}{", ..." * (len(tensors) > len(names))}'


# Names.


def _prefixes(tensors: Tensors) -> dict[str, Callable[[str], str]]:
  """The prefix of each ResNet, and a function: name after the prefix -> name in torchvision."""
  found: dict[str, Callable[[str], str]] = {}
  numbers: dict[str, list[int]] = {}
  for name in tensors:
    if match := NAMED.fullmatch(name):
      found[match[1] or ''] = _plain
    elif match := NUMBERED.fullmatch(name):
      numbers.setdefault(match[1] or '', []).append(int(match[2]))
      found.setdefault(match[1] or '', _plain)  # keeps the order
    elif match := TRANSFORMERS.fullmatch(name):
      found[match[1] or ''] = _of_transformers
  for prefix, layers in numbers.items():
    if f'{prefix}0.weight' in tensors or f'{prefix}0.0.weight' in tensors:
      found[prefix] = functools.partial(_of_sequential, first=min(layers), last=max(layers))
    elif found[prefix] is _plain:
      del found[prefix]
  return found


def _plain(name):
  """The name in torchvision: CIFAR ResNets of PyTorch say `shortcut` instead of `downsample`."""
  return re.sub(r'^(layer\d+\.\d+\.)shortcut\.', r'\1downsample.', name)


def _of_sequential(name, first, last):
  """The name in torchvision of a child of a `torch.nn.Sequential`, whose layers have the numbers `first` to `last`."""
  number, _, rest = name.partition('.')
  if not number.isdigit():
    return name
  i = int(number)
  layers = {0: 'conv1', 1: 'bn1', **{n: f'layer{n - first + 1}' for n in range(first, last + 1)}}
  return _plain(f'{layers.get(i, "fc" if i > last else f"child{i}")}.{rest}')


def _of_transformers(name):
  """The name in torchvision of a tensor of Hugging Face's ResNetModel."""
  stage = re.fullmatch(r'encoder\.stages\.(\d+)\.layers\.(\d+)\.(.*)', name)
  if not stage:
    layers = {'embedder.embedder.convolution': 'conv1', 'embedder.embedder.normalization': 'bn1'}
    layer, _, leaf = name.rpartition('.')
    return f'{layers[layer]}.{leaf}' if layer in layers else name
  inner = stage[3].replace('shortcut.convolution', 'downsample.0')
  inner = inner.replace('shortcut.normalization', 'downsample.1')
  kinds = {'convolution': 'conv', 'normalization': 'bn'}
  inner = re.sub(
    r'^layer\.(\d+)\.(convolution|normalization)',
    lambda m: f'{kinds[m[2]]}{int(m[1]) + 1}',
    inner,
  )
  return f'layer{int(stage[1]) + 1}.{stage[2]}.{inner}'


def _labels(prefixes: Sequence[str]) -> list[str]:
  """How the user selects the network of each prefix: the words that tell the prefixes apart; '' for a single one."""
  if len(prefixes) == 1:
    return ['']
  words = [[w for w in prefix.split('.') if w and w not in WRAPPERS] for prefix in prefixes]
  shortest = min(map(len, words))
  start = next((i for i in range(shortest) if len({w[i] for w in words}) > 1), shortest)
  rest = [w[start:] for w in words]
  shortest = min(map(len, rest))
  end = next((i for i in range(shortest) if len({w[-1 - i] for w in rest}) > 1), shortest)
  labels = ['.'.join(r[: len(r) - end] or w[-1:]) or 'root' for r, w in zip(rest, words)]
  if len(set(labels)) < len(labels):
    labels = [prefix.rstrip('.') or 'root' for prefix in prefixes]
  return [printable(label) for label in labels]


def _role(name: str) -> set[str]:
  """The words in a name that tell networks apart: `state_dict.module.encoder_q.` -> {'q'}."""
  return set(re.findall('[a-z]+', name.lower())) & ROLES


def _kind(word: str) -> str:
  """What a part of a name stands for: 'head', 'classifier', 'other' (predictor, prototypes), or ''."""
  word = word.lower()
  if re.search('predict|prototype', word):
    return 'other'
  if re.search('proj|head|neck|mlp', word) or word in ('fc', 'g'):
    return 'head'
  return 'classifier' if re.search('classif|linear|probe', word) else ''


# Networks.


def _networks(file: _File, prefixes, given) -> list[Network]:
  """The networks of a file with these prefixes."""
  encoders: dict[str, Tensors] = {prefix: {} for prefix in prefixes}
  modules: dict[str | None, dict[str, Tensors]] = {prefix: {} for prefix in (*prefixes, None)}
  for name, array in file.tensors.items():
    prefix = max((p for p in prefixes if name.startswith(p)), key=len, default=None)
    inner = name if prefix is None else prefixes[prefix](name.removeprefix(prefix))
    word = inner.split('.')[0]
    if prefix is not None and not (_kind(word) or STATE.fullmatch(word)):
      encoders[prefix][inner] = array
    else:
      module, rest = _module(inner)
      modules[prefix].setdefault(f'{prefix or ""}{module}', {})[rest] = array
  roles = [_role(prefix) for prefix in prefixes]
  labels = _labels(list(prefixes))
  result = []
  for prefix, label, role in zip(prefixes, labels, roles):
    own = [_Module(name, x) for name, x in modules[prefix].items()]
    left = [_Module(p.rstrip('.') or 'root', x) for p, x in encoders.items() if p != prefix]
    for name, x in modules[None].items():
      # A head beside the encoders belongs to the only one with the same role.
      is_own = _role(name) == role and roles.count(role) == 1
      (own if is_own else left).append(_Module(name, x))
    result.append(_network(file, label, encoders[prefix], own, left, given))
  return result


def _module(name: str) -> tuple[str, str]:
  """(module, name in the module) of a tensor of no encoder: of a head, or of what precedes the first number."""
  words = name.split('.')
  ends = [i + 1 for i, word in enumerate(words[:-1]) if _kind(word)]
  ends += [i for i, word in enumerate(words) if word.isdigit() and i]
  end = ends[0] if ends else len(words)
  return '.'.join(words[:end]), '.'.join(words[end:])


def _network(file: _File, label, tensors: Tensors, modules, left, given) -> Network:
  """A network of its tensors with torchvision's names; `modules` may be its head and classifier, `left` is left out."""
  what = f'{printable(file.path)}, {printable(label)}' if label else printable(file.path)
  _refuse_others(tensors, what)
  said = {**given, **{name: x for name, x in file.model.items() if name != 'normalize'}}
  model = _model(tensors, said, what)
  for name, value in model.items():
    for other in (file.model.get(name, value), given.get(name, value)):
      if other != value:
        source = 'as the file says' if name in file.model else 'by names and shapes'
        raise ConfigError(
          f'{what}: {name} is {value} {source}, not {other}: set model.{name}={value} (--{name})'
        )
  encoder = torch_names.from_torch(_tensors(model), tensors, what)
  head, classifier = None, None
  changes: list[str] = []
  for module in modules:
    place = f'{what}, {printable(module.name)}'
    kind = next(filter(None, map(_kind, module.name.split('.'))), '')
    layers = torch_heads.layers(module.tensors) if kind in ('head', 'classifier') else []
    if _is_classifier(file, module, kind, layers):
      found = (
        None if classifier else torch_heads.classifier(layers[0], assemble.features(model), place)
      )
      classifier = classifier or found
    else:
      found = (
        torch_heads.head(layers, model, place) if kind == 'head' and layers and not head else None
      )
      if found:
        fields, head, changes = found
        model |= fields
    if not found:
      left = [*left, module]
  normalize, notes = _notes(file, model, given, left)
  notes += changes
  return Network(
    label, model, encoder, head, classifier, normalize, tuple(notes), file.preprocessing
  )


def _is_classifier(file, module, kind, layers) -> bool:
  """Whether a module is a linear classifier; a single layer is the head of MoCo v1, whose files have a queue."""
  if len(layers) != 1 or layers[0].norm:
    return False
  moco = any(name.split('.')[-1] == 'queue' for name in file.tensors)
  is_head = moco or file.model.get('features') == 'z' or 'proj' in module.name.lower()
  return kind == 'classifier' or not is_head


def _notes(file, model, given, left) -> tuple[str | None, list[str]]:
  """`normalize` of a network, and what was assumed and left out."""
  normalize, notes = given.get('normalize') or file.model.get('normalize'), []
  if not normalize and model['variant'] == 'torchvision':
    normalize = 'imagenet'
    notes.append(
      "assumed, because the file does not say: images normalised with ImageNet's mean and standard deviation "
      '(--normalize)'
    )
  if left:
    names = [f'{printable(module.name)} ({_count(module)})' for module in left]
    more = f' and {len(names) - SHOWN:,} more' if len(names) > SHOWN else ''
    notes.append(f'left out: {", ".join(names[:SHOWN])}{more}')
  return normalize, notes


def _count(module):
  n = len(module.tensors)
  return f'{n:,} tensor{"s" * (n > 1)}'


def _refuse_others(tensors, what) -> None:
  """Raises ConfigError with the name of a network that looks like a ResNet but is none of this package."""
  for pattern, kind in OTHERS.items():
    if any(re.fullmatch(pattern, name) for name in tensors):
      raise ConfigError(f'{what} is {kind}, which is none of this package')
  shapes = {name: array.shape for name, array in tensors.items()}
  for name, array in tensors.items():
    if (
      array.dtype.kind != 'f'
      and array.dtype != 'bfloat16'
      and not name.endswith('num_batches_tracked')
    ):
      raise ConfigError(
        f'{what}: {printable(name)} has the dtype {array.dtype}, not floating point'
      )
  conv1, conv2 = (shapes.get(f'layer1.0.conv{i}.weight', ()) for i in (1, 2))
  if len(conv1) != 4 or len(conv2) != 4 or not all((*conv1, *conv2)):
    return
  if conv2[1] != conv1[0]:
    groups = f'{conv2[0] // conv2[1]} groups'
    raise ConfigError(
      f'{what} is a ResNeXt, whose convolutions have {groups}: none of this package'
    )
  if 'layer1.0.conv3.weight' in shapes and conv1[0] != conv1[1]:
    raise ConfigError(
      f'{what} is a wide_resnet, whose 3x3 convolutions have {conv1[0]} instead of {conv1[1]} channels: this package '
      'widens all layers (width_multiplier)'
    )
  if 'bn1.weight' in shapes and 'bn1.running_mean' not in shapes:
    raise ConfigError(f'{what} has GroupNorm or another norm instead of BatchNorm')


def _model(tensors: Tensors, given, what) -> dict[str, Any]:
  """The `model.*` fields of an encoder; `given` has those that shapes do not say."""
  deep = 'conv1.0.weight' in tensors
  stem = _shape(tensors, 'conv1.0.weight' if deep else 'conv1.weight', 4, what)
  width = _shape(tensors, 'conv1.6.weight', 4, what)[0] if deep else stem[0]
  if stem[1] != 3 or not width:
    raise ConfigError(
      f'{what}: the first convolution is {stem}: only networks for RGB are imported'
    )
  blocks: list[int] = []
  while own := {n.split('.')[1] for n in tensors if n.startswith(f'layer{len(blocks) + 1}.')}:
    blocks.append(len(own))
  bottleneck = any(re.fullmatch(r'layer1\.0\.conv3\.(conv\.)?weight', n) for n in tensors)
  depths = {value: depth for depth, value in resnet.DEPTHS.items()}
  if (tuple(blocks), bottleneck) not in depths:
    names = ', '.join(map(str, resnet.DEPTHS))
    kind = 'bottleneck blocks' if bottleneck else 'blocks'
    raise ConfigError(f'{what} has {blocks} {kind} in its groups, which is none of ResNet-{names}')
  sk_ratio, se_ratio = _ratios(tensors, width, blocks, bottleneck, what)
  if sk_ratio == 0 and (deep or _dimensions(tensors, 'layer2.0.downsample.1.weight') == 4):
    raise ConfigError(
      f'{what} is a ResNet-C, ResNet-D or similar (resnet50d of timm): none of this package'
    )
  return {
    'depth': depths[tuple(blocks), bottleneck],
    'width_multiplier': width / 64,
    'sk_ratio': sk_ratio,
    'se_ratio': se_ratio,
    'stem': _stem(stem[2:], deep, given, what),
    'variant': _variant(tensors, bottleneck, sk_ratio, given),
  }


def _ratios(tensors, width, blocks, bottleneck, what) -> tuple[float, float]:
  """`sk_ratio` and `se_ratio`, from the last block."""
  last = f'layer{len(blocks)}.{blocks[-1] - 1}'
  filters = width * 2 ** (len(blocks) - 1)
  sk_ratio, se_ratio = 0.0, 0.0
  selective, squeeze = f'{last}.conv2.attn.fc_reduce.weight', f'{last}.se.fc1.weight'
  if selective in tensors:
    found = _shape(tensors, selective, 4, what)[0]
    sk_ratio = 0.0625 if found == max(filters // 16, 32) else found / filters
    if _dimensions(tensors, 'layer2.0.downsample.0.weight') == 4:
      raise ConfigError(
        f'{what} is an SKNet without the shortcuts of SimCLR v2 (skresnet of timm): none of this package'
      )
  elif not bottleneck and _dimensions(tensors, 'layer1.0.downsample.1.weight') == 4:
    sk_ratio = (
      0.0625  # selective kernels are in bottleneck blocks only, shortcuts and stem change in all
    )
  if squeeze in tensors:
    se_ratio = _shape(tensors, squeeze, 4, what)[0] / filters
  return sk_ratio, se_ratio


def _dimensions(tensors, name) -> int:
  return tensors[name].ndim if name in tensors else 0


def _shape(tensors, name, dimensions, what):
  if name not in tensors:
    raise ConfigError(f'{what}: the file lacks {name}')
  if tensors[name].ndim != dimensions:
    raise ConfigError(f'{what}: {name} has the shape {tensors[name].shape[:8]}')
  return tensors[name].shape


def _stem(size, deep, given, what) -> str:
  if deep or size == (7, 7):
    return 'imagenet'
  if size != (3, 3):
    raise ConfigError(f'{what}: the first convolution is {size[0]}x{size[1]}, not 7x7 or 3x3')
  if given.get('stem', 'imagenet') == 'imagenet':
    raise ConfigError(
      f'{what}: the first convolution is 3x3, and its stride is not in the file: use --stem=cifar (stride 1) or '
      '--stem=strided (stride 2), or model.stem of the recipe'
    )
  return given['stem']


def _variant(tensors, bottleneck, sk_ratio, given) -> str:
  """The variant; a projection in the first group of a ResNet-18 or 34 excludes torchvision's."""
  wanted = given.get('variant', 'torchvision')
  if sk_ratio:
    return 'simclr'
  if bottleneck:
    return wanted
  if not any(name.startswith('layer1.0.downsample.') for name in tensors):
    return 'torchvision'
  return wanted if wanted != 'torchvision' else 'simclr'


def _tensors(model) -> list[torch_names.Tensor]:
  return _cached_tensors(tuple(sorted(assemble.architecture(model).items())))


@functools.lru_cache(maxsize=4)
def _cached_tensors(items):
  return torch_names.encoder(dict(items))
