"""Runs to groups, sections and numbers: what may be compared, and what the claims come to."""
