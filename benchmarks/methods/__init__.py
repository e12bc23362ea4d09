"""Parts of bench_methods.py: the methods, loops as their authors' code works, what follows from the times."""
