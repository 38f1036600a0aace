"""The only file that may name jax's private modules. Nothing needs them so far."""
