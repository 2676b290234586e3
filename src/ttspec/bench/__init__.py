"""Arms that run the same requests, what they measured, and reports on it."""
