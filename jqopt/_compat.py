"""The only file that may name jax's private modules. Nothing needs them so far: JAX 0.10 to 0.12 differ only in duck types."""
