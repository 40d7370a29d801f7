"""Networks: the only files that import flax.linen."""
