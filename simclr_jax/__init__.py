"""Contrastive pretraining of image encoders in JAX: SimCLR and MoCo, from a laptop to a TPU pod.

The public names are imported on first use, so that `import simclr_jax` is fast:

  pretrain(config, workdir)       trains or resumes a run; returns the exit code
  load_recipe(spec, overrides)    a built-in recipe, or a Python file; `RECIPE:VARIANT`
  load_data(config.data, split)   the data set of a recipe
  load_encoder(folder)            the encoder of a run, or an exported one: `encoder(images)` -> features
  load_classifier(folder)         the network of a fine-tuned, distilled or supervised run
  embed(encoder, dataset, file)   writes the features of a data set to a file
  knn(...)                        accuracy of the weighted kNN classifier
  Arrays, Dataset, Encoder        classes
  ConfigError                     raised for invalid recipes, data sets and run directories
"""

import importlib
import os

__version__ = '0.1.0'
_API = {
  'Arrays': ('data', 'Arrays'),
  'ConfigError': ('errors', 'ConfigError'),
  'Dataset': ('data', 'Dataset'),
  'Encoder': ('encoder', 'Encoder'),
  'embed': ('evaluate.embed', 'embed'),
  'knn': ('evaluate.knn', 'accuracy'),
  'load_classifier': ('runs', 'load_classifier'),
  'load_data': ('data', 'load'),
  'load_encoder': ('runs', 'load_encoder'),
  'load_recipe': ('config', 'load'),
  'pretrain': ('train', 'pretrain'),
}
__all__ = list(_API)

# Since jaxlib 0.10.2, XLA's CPU compiler uses YNNPACK for reductions and matrix products. For a small ResNet, this is
# 2-4 times slower and sometimes crashes with reads out of bounds (github.com/jax-ml/jax/issues/39257). An empty list
# disables YNNPACK; other backends ignore the flag. XLA reads the variable once, before its first compilation.
if 'xla_cpu_experimental_ynn_fusion_type' not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_cpu_experimental_ynn_fusion_type='
  ).strip()


def __getattr__(name: str):
  if name not in _API:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module, attribute = _API[name]
  return getattr(importlib.import_module(f'{__name__}.{module}'), attribute)


def __dir__() -> list[str]:
  return sorted({*globals(), *_API})
