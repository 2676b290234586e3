"""How a drafter learns from what the target verifies."""
