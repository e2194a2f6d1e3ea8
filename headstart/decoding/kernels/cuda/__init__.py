"""What a decoding pass runs on a GPU: kernels in Triton, and blocks that call them."""
