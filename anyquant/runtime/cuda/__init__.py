"""Products with quantized matrices on NVIDIA GPUs. Importing this imports neither torch nor CUDA."""
