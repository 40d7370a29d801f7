"""`python -m simclr_jax` is `simclr-jax`."""

import sys

from simclr_jax.cli import main

if __name__ == '__main__':
  sys.exit(main())
