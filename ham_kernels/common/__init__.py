"""The ground floor: checks of input, whole-file writes, locks, provenance. Knows nothing of the rooms above."""
