"""Writes README.md of an exported folder: a model card, with the head that the Hugging Face Hub reads."""

import json
from typing import Any

from simclr_jax.interop.model import Model, normalization, view
from simclr_jax.runtime.text import printable

LIBRARIES = {'timm': 'timm', 'huggingface': 'timm', 'onnx': 'onnx'}  # names of the Hub


def text(
  model: Model, name: str, module: Any, verified: dict[str, Any], license: str, results: list[str]
) -> str:
  """The model card.

  Args:
    model: the network.
    name: of the format.
    module: of the format, see `export`.
    verified: see `export.write`.
    license: of the weights; '' if it is not known.
    results: tables of evaluations of the network, as text.
  """
  parts = [_head(model, name, license), _about(model), '## How to load', module.needs(model) + '.']
  language = 'yaml' if name == 'detectron2' else 'python'
  parts.append(f'```{language}\n{module.usage(model)}```')
  parts += ['\n'.join(f'- {sentence}' for sentence in module.limits(model))]
  parts += ['## Preprocessing', _preprocessing(model), '## Training', _training(model)]
  if results:
    parts += ['## Evaluation', *(f'```\n{result}\n```' for result in results)]
  parts += ['## Verified', _verified(verified)]
  return '\n\n'.join(part for part in parts if part) + '\n'


def _head(model, name, license):
  task = 'image-classification' if model.classes else 'image-feature-extraction'
  lines = [f'library_name: {LIBRARIES[name]}'] if name in LIBRARIES else []
  return '\n'.join((
    '---', *lines, 'tags:', '- self-supervised-learning', f'- {_config(model).get("method", "simclr")}', '- simclr_jax',
    f'license: {json.dumps(printable(license or "unknown"))}', f'pipeline_tag: {task}', '---',
  ))  # fmt: skip


def _config(model):
  return model.provenance.get('config', {})


def _about(model):
  a = model.architecture
  title = printable(a['encoder'] or f'ResNet-{a["depth"]}')
  traits = [] if a['encoder'] else [
    f'width {a["width_multiplier"]:g}', f'{a["stem"]} stem', f'variant {a["variant"]}',
    *['selective kernels'] * (a['sk_ratio'] > 0), *['squeeze and excitation'] * (a['se_ratio'] > 0),
  ]  # fmt: skip
  output = {
    '': 'features',
    'projection': 'features and the projection z',
    'logits': 'features and logits',
  }
  return (
    f'# {title}\n\n{", ".join([*traits, "exported by simclr_jax"])}. Output: {output[model.top]}.'
  )


def _preprocessing(model):
  a = model.architecture
  mean, std = normalization(a)
  found = view(a)
  lines = [
    f'Images of {a["image_size"]} pixels, {a.get("channels", 3)} channels{", RGB" * (a.get("channels", 3) == 3)}, '
    f'values in [0, 1], mean {mean}, standard deviation {std}.',
  ]
  if found.get('crop_mode') == 'center':
    lines.append(
      f'Larger images: the central square, {found["crop_pct"]:g} of the shorter side, resized with {found["interpolation"]} '
      'interpolation. Images that have this size already are not cropped.'
    )
  else:
    lines.append(f'Larger images: the pipeline `{printable(a["eval_view"])}` of simclr_jax.')
  return ' '.join(lines)


def _training(model):
  about, config = model.provenance, _config(model)
  images = about.get('images') or {}
  fields = ('method', 'batch_size', 'epochs', 'steps', 'optimizer', 'learning_rate', 'weight_decay', 'temperature')  # fmt: skip
  rows = {
    'images': f'{images["images"]:,}, {images.get("place", "")}' if 'images' in images else '',
    'recipe': ', '.join(f'{name}={config[name]}' for name in fields if config.get(name)),
    'weights': about.get('weights', ''),
    'step': about.get('step', ''),
    'command': about.get('command', ''),
    'versions': ', '.join(f'{k} {v}' for k, v in about.get('versions', {}).items()),
  }
  lines = [f'- {name}: {printable(value)}' for name, value in rows.items() if value not in ('', 0)]
  return '\n'.join(lines) or 'Not recorded.'


def _verified(verified):
  lines = [
    f'- {size} pixels, {name}: {value:.1e}'
    for size, values in verified['difference'].items()
    for name, value in values.items()
  ]
  return (
    f'After writing, the files were read by {verified["reader"]} and compared with simclr_jax on {verified["images"]}. '
    'Largest difference, relative to the largest output:\n\n' + '\n'.join(lines)
  )
