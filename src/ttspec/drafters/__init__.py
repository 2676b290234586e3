"""Drafters, one file each, and their checkpoints."""
