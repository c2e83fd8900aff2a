"""The CUDA backend: hand-written kernels (kernels_cuda/*.cu) launched through CuPy."""
