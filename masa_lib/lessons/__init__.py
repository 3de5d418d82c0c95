"""What only the notebooks use, and the two commands that print what they show: `masa probe`, `masa replay`."""
