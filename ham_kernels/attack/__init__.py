"""PGD: `pgd` (the attack as one object, and `pgd_attack`), `replay` (steps as CUDA graphs), `step` (rows, one step)."""
