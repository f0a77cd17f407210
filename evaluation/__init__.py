"""What evaluate.py measures, and how it shows it."""
