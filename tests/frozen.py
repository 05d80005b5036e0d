"""Imported last by a server: the garbage collector then looks only at what the forked processes make.

What is imported is some hundred thousand objects, and a collection takes longer than to train a model of a test.
"""

import gc

gc.collect()
gc.freeze()
