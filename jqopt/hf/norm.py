"""RMSNorm, with a weight that is a gain (Llama) or a gain's distance from one (Gemma)."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + scale) over the last axis, computed in float32 and returned in x's dtype."""

    epsilon: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        inv_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + jnp.float32(self.epsilon))
        gain = scale.astype(jnp.float32)
        gain = gain if self.offset == 0 else gain + jnp.float32(self.offset)
        return (wide * inv_rms * gain).astype(x.dtype)
