"""A network that is exported: an encoder, with its projection head or classifier on request."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from simclr_jax.data import augment
from simclr_jax.encoder import Encoder
from simclr_jax.interop import torch_names
from simclr_jax.models import encoders, linear, mlp, network, resnet

PyTree = Any
Outputs = dict[str, Any]  # 'features' [n, d], and 'projection' or 'logits'


@dataclasses.dataclass(frozen=True)
class Model:
  """A network that is exported.

  Attributes:
    architecture: plain data, see `config.architecture`.
    variables: numpy arrays: 'encoder' -> flax variables; with a top, 'head' -> flax variables of the layers of the
      projection head that go along; with a classifier, 'classifier' -> `kernel`, `bias`.
    top: 'projection', 'logits', or '': the output beside the features.
    provenance: as of `Encoder`.
    training: the state of a MoCo training, see `moco_checkpoint.training`; only --to=moco needs it.
  """

  architecture: dict[str, Any]
  variables: dict[str, PyTree]
  top: str
  provenance: dict[str, Any]
  training: dict[str, Any] | None = None

  @property
  def kept(self) -> int:
    """Number of layers of the projection head that go along."""
    if self.top == 'logits':
      return self.architecture['head_layer']
    return mlp.depth(self.architecture) if self.top else 0

  @property
  def classes(self) -> int:
    """Number of classes of the classifier; 0 without one."""
    return len(self.variables['classifier']['bias']) if self.top == 'logits' else 0

  def forward(self) -> Callable[[PyTree, jax.Array], Outputs]:
    """`forward(variables, x)`: images x, float32 `[n, h, w, c]` in [0, 1] -> outputs, float32."""
    f = encoders.build(self.architecture)
    g = mlp.head(self.architecture, keep=self.kept)

    def run(variables, x):
      h = f.apply(variables['encoder'], x, train=False)
      if not self.top:
        return {'features': h}
      outputs: Any = g.apply(variables['head'], h, train=False)
      y = outputs[-1]
      if self.top == 'logits':
        y = linear.logits(variables['classifier'], y)
      return {'features': h, self.top: y}

    return run

  def outputs(self, x: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs for images x, float32 `[n, h, w, c]` in [0, 1], in full precision on every device."""
    with jax.default_matmul_precision('highest'):
      return jax.device_get(jax.jit(self.forward())(self.variables, x))

  def tensors(self) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch file, see `torch_names`; those of the top begin with `fc.`, as in torchvision.

    Raises:
      ConfigError: the encoder is not a ResNet of this package.
    """
    found = torch_names.to_torch(torch_names.encoder(self.architecture), self.variables['encoder'])
    return found | {f'fc.{name}': x for name, x in self._top_tensors().items()}

  def _top_tensors(self) -> dict[str, np.ndarray]:
    """The tensors of a `torch.nn.Sequential`, or of a single `torch.nn.Linear`."""
    head, place = self.variables.get('head', {}), ''
    found = {}
    if self.kept:
      d = head['params']['dense1']['kernel'].shape[0]
      found = torch_names.to_torch(torch_names.head(self.architecture, d, self.kept), head)
    if self.top != 'logits':
      return found
    if self.kept:
      found = {name if name[0].isdigit() else f'0.{name}': x for name, x in found.items()}
      relu = self.kept < mlp.depth(self.architecture)
      place = f'{max(int(name.split(".")[0]) for name in found) + 1 + relu}.'
    classifier = self.variables['classifier']
    kernel = np.ascontiguousarray(np.asarray(classifier['kernel']).T)
    return found | {f'{place}weight': kernel, f'{place}bias': np.asarray(classifier['bias'])}


def check_weights(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
  """Compares the weights in a file with those that were written: a comparison of outputs does not see unused ones.

  Raises:
    ValueError: they are not the same, to the last bit.
  """
  if found.keys() != wanted.keys():
    raise ValueError(f'{sorted(found.keys() ^ wanted.keys())[:4]} are missing or left over')
  for name, x in wanted.items():
    if not np.array_equal(np.asarray(found[name]), np.asarray(x)):
      raise ValueError(f'{name} differs from what was written')


def flat(variables: PyTree) -> dict[str, np.ndarray]:
  """Variables by their path, such as 'encoder/params/stem_conv/kernel'."""
  return {
    '/'.join(key.key for key in path): np.ascontiguousarray(x)
    for path, x in jax.tree_util.tree_leaves_with_path(variables)
  }


def of(encoder: Encoder) -> Model:
  """The network of `runs.load_encoder`, `load_projection` or `load_classifier`."""
  a, variables = encoder.architecture, jax.device_get(encoder.variables)
  top = 'projection' if a.get('features') == 'z' else 'logits' if 'classes' in a else ''
  if not top:
    return Model(a, {'encoder': variables}, '', encoder.provenance)
  params, stats = variables['params'], variables['batch_stats']
  parts = {
    'encoder': network.encoder(params, stats),
    'head': {'params': params['head'], 'batch_stats': stats['head']},
  }
  if top == 'logits':
    parts['classifier'] = params['classifier']
  return Model(a, parts, top, encoder.provenance)


def with_head(encoder: Encoder, head: PyTree) -> Encoder:
  """An encoder whose features are z, like `runs.load_projection`, of an encoder and the flax variables of its head."""
  parts = {'encoder': encoder.variables, 'head': head}
  variables = {
    key: {part: tree.get(key, {}) for part, tree in parts.items()}
    for key in ('params', 'batch_stats')
  }
  return Encoder({**encoder.architecture, 'features': 'z'}, variables, encoder.provenance)


def normalization(architecture: dict[str, Any]) -> tuple[list[float], list[float]]:
  """Mean and standard deviation of each channel, of pixels in [0, 1]; 0 and 1 if pixels are not normalised."""
  channels = architecture.get('channels', 3)
  unchanged = ((0.0,) * channels, (1.0,) * channels)
  mean, std = resnet.NORMALIZE.get(architecture['normalize'], unchanged)
  return list(mean), list(std)


def view(architecture: dict[str, Any]) -> dict[str, Any]:
  """The evaluation view in the terms of timm: `crop_pct`, `crop_mode`, `interpolation`; empty if timm has no such view."""
  ops = augment.parse(architecture['eval_view'], random=False)
  kinds = {
    'center_crop': ('center', 'bicubic'), 'torch_center_crop': ('center', 'bilinear'), 'resize': ('squash', 'bilinear'),
  }  # fmt: skip
  if len(ops) > 1 or ops[0].name not in kinds:
    return {}
  mode, interpolation = kinds[ops[0].name]
  fraction = ops[0].arguments.get('fraction', 1.0)
  return {'crop_pct': fraction, 'crop_mode': mode, 'interpolation': interpolation}
