"""Looking at gradients: how few dimensions hold them, and for how many steps the same few do.

| module | what it answers |
| --- | --- |
| `config` | which settings an inspection has |
| `subject` | what is looked at: a model that is about to train, and how |
| `of_run`, `of_model` | the subject of a run folder; of a model with data |
| `watch` | what the gradients of one weight come to |
| `observing` | the steps that are made, and the looks at them |
| `session` | from subject to figures |
| `kinds` | the figures of weights that play the same part, together |
| `recommend` | which rank and which gap they suggest |
| `result` | all figures, as JSON has them |
| `drawing`, `report`, `folder` | pictures, page and tables; the folder that they go into |
| `command` | how the command line starts it |
"""
