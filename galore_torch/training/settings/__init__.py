"""Settings: declared once, checked, read from files and flags; the optimizer's and the methods'."""
