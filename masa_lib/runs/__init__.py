"""A run as a folder: what is recorded, how it is stopped and resumed, and how it is steered while it runs."""
