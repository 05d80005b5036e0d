"""After a training: ``galore evaluate`` and ``galore predict``, of a run or of any model."""
