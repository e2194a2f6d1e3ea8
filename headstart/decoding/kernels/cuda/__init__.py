"""Triton kernels of a decoding pass on a GPU, and the modules that call them."""
