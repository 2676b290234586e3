"""The round, and everything around it up to text."""
