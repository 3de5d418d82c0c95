"""MASA in verl 0.9.1: `rows`, `sampler` and `advantage`; docs/verl.md says how they are used."""
