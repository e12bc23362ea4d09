"""Parts of bench_kernels.py."""
