"""What README and docs quote, and the machine that it was measured on."""
