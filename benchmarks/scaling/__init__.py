"""Parts of simulate_ranks.py."""
