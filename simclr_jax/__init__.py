"""Contrastive pretraining of image encoders in JAX: SimCLR and MoCo, from a laptop to a TPU pod.

The names below are imported when they are used first, so that `import simclr_jax` takes no time:

  pretrain(config, workdir)       trains a recipe, or resumes; returns the exit code
  load_recipe(spec, overrides)    a built-in recipe or the path of one, `RECIPE:VARIANT`
  load_data(config.data, split)   the images of a recipe
  load_encoder(folder)            the encoder of a run or of an export: `encoder(images)` -> features
  load_classifier(folder)         the network of a fine-tuned or distilled run
  embed(encoder, images, file)    writes the features of a data set to a file
  knn(...)                        accuracy of the weighted kNN classifier
  Arrays, Dataset, Encoder        classes
  ConfigError                     the error of invalid recipes, data and folders
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

# XLA's CPU compiler hands reductions and matrix products to YNNPACK from jaxlib 0.10.2 on. On the
# shapes of a small ResNet that path is 2-4 times slower and sometimes reads past its buffers and
# crashes (github.com/jax-ml/jax/issues/39257). An empty list switches YNNPACK off; other backends ignore
# the flag. XLA reads the variable once, before its first compilation.
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
