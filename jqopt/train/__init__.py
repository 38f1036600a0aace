"""Low-precision training: the quantizers of NVFP4 and FP8 GEMMs, forward and backward."""
