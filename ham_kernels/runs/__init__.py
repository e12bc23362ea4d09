"""What a run is told (settings, presets, TOML) and what it leaves (its folder, checkpoints), side by side."""
