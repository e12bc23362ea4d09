"""Run folders to dataclasses: what is there, what is missing, what cannot be read."""
