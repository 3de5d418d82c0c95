"""What is asked and what is right: problems and where they come from, grading, and the predictions' form."""
