"""Methods beside each other at equal data: ``galore compare``."""
