"""Contrastive pretraining of image encoders in JAX: SimCLR, from a laptop to a TPU pod."""

import os

__version__ = '0.1.0'

# XLA's CPU compiler hands reductions and matrix products to YNNPACK from jaxlib 0.10.2 on. On the
# shapes of a small ResNet that path is 2-4 times slower and sometimes reads past its buffers and
# dies (github.com/jax-ml/jax/issues/39257). An empty list switches it off; no other backend looks
# at it. XLA reads the variable once, before its first compilation.
if 'xla_cpu_experimental_ynn_fusion_type' not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_cpu_experimental_ynn_fusion_type='
  ).strip()
