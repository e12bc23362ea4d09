"""How the compiled libraries are built: `build` (both), `cuda` (the extension), `cpu` (Winograd convolutions)."""
