"""Float32 kernels for CPUs, compiled on the machine that serves: batch-invariant, and faster than MKL at few rows."""
