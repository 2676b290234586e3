"""What would silently kill acceptance: read from the files, and measured."""
