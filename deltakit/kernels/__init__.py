"""Work that torch has no good CUDA kernel for: Triton kernels, and when they are used."""
