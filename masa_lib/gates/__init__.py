"""What chooses the problems: MASA's gate, baselines beside it, gates by a belief, and the table of all of them."""
