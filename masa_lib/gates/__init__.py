"""What chooses the problems: rivals of MASA's gate, gates by a belief, and the table of all of them."""
