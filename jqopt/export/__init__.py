"""Writing quantized models to disk: checkpoints (Orbax) and the formats of other tools, one file a target."""
