"""Contrastive pretraining of image encoders in JAX: SimCLR and MoCo, from a laptop to a TPU pod.

  run = simclr_jax.pretrain('my_photographs')
  features = run.encoder(images)

The public names are imported on first use, so that `import simclr_jax` is fast:

  pretrain(images, ...)           trains or resumes; returns a Run
  load_run(folder), Run           a run: history, encoder, knn, probe, embed, report, export
  load_recipe(spec, overrides)    a built-in recipe, or a Python file; `RECIPE:VARIANT`
  load_data(data, split)          a data set: a folder or anything else that `--data` accepts; images in memory
  load_encoder(folder)            the encoder of a run, or an exported one: `encoder(images)` -> features
  load_classifier(folder)         the network of a fine-tuned, distilled or supervised run
  embed(encoder, dataset, file)   writes the features of a data set to a file
  knn(...)                        accuracy of the weighted kNN classifier, of features
  Arrays, Callback, Dataset, Encoder   classes
  ConfigError                     raised for invalid recipes, data sets and run directories
"""

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from simclr_jax.api import Run, load_data, load_run, pretrain
  from simclr_jax.config import load as load_recipe
  from simclr_jax.data import Arrays, Dataset
  from simclr_jax.encoder import Encoder
  from simclr_jax.errors import ConfigError
  from simclr_jax.evaluate.embed import embed
  from simclr_jax.evaluate.knn import accuracy as knn
  from simclr_jax.recorder import Callback
  from simclr_jax.runs import load_classifier, load_encoder

__version__ = '0.1.0'
__all__ = [
  'Arrays', 'Callback', 'ConfigError', 'Dataset', 'Encoder', 'Run', 'embed', 'knn', 'load_classifier', 'load_data',
  'load_encoder', 'load_recipe', 'load_run', 'pretrain',
]  # fmt: skip
_API = {
  'Arrays': ('data', 'Arrays'),
  'Callback': ('recorder', 'Callback'),
  'ConfigError': ('errors', 'ConfigError'),
  'Dataset': ('data', 'Dataset'),
  'Encoder': ('encoder', 'Encoder'),
  'Run': ('api', 'Run'),
  'embed': ('evaluate.embed', 'embed'),
  'knn': ('evaluate.knn', 'accuracy'),
  'load_classifier': ('runs', 'load_classifier'),
  'load_data': ('api', 'load_data'),
  'load_encoder': ('runs', 'load_encoder'),
  'load_recipe': ('config', 'load'),
  'load_run': ('api', 'load_run'),
  'pretrain': ('api', 'pretrain'),
}

# TensorFlow, which reads images, would print a dozen lines when it is imported.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
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
