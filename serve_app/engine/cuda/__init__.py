"""What only a CUDA device has: kernels written in Triton, and steps replayed from captured graphs."""
