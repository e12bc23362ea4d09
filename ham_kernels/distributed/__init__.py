"""Several processes that train one model together. Knows nothing of attacks."""
