"""Training a drafter from nothing."""
