"""Parts of bench_pgd.py."""
