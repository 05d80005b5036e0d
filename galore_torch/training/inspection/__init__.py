"""``galore inspect``: how few dimensions hold the gradients, and for how many steps the same few do.

| module | what it answers |
| --- | --- |
| `config` | which settings an inspection has |
| `jobs` | what is inspected: a run's own job, or the job that a model with data would be |
| `observer` | the steps that are made, and the snapshots of gradients on the way |
| `history` | the gradients of one weight, and what earlier ones' bases hold of them |
| `figures` | those of modules that play the same part in every layer, the rank and gap that they suggest, the JSON |
| `report` | plots, table and page |
| `command` | from flags to screen and folder |
"""
