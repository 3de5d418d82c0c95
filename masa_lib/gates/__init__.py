"""What chooses the problems: baselines beside MASA's gate, gates by a belief, and the table of all of them."""
