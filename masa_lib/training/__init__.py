"""Training: one step is one turn of Algorithm 1 (`trainer`); evaluation, what guards an update, and export."""
