"""Measurements beside peers and physical floors: scripts to run from the checkout, not part of what is installed."""
