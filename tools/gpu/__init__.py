"""What tools/gpu_check and tools/benchmark_cuda.py are made of."""
