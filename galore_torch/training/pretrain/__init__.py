"""Pre-training: ``galore pretrain``."""
