"""Fine-tuning on Transformers' Trainer and TRL's SFTTrainer.

| module | what it answers |
| --- | --- |
| `config`, `presets` | which settings a fine-tuning has, and which values the paper used |
| `tasks` | GLUE's tasks: columns, held-out splits, metrics |
| `data` | which rows are trained on and which are held out |
| `labels` | what labels are: classes or numbers |
| `scores` | how predictions are scored |
| `base_model` | the model and tokenizer that are fine-tuned, and whether they fit |
| `classification`, `supervised` | the trainer of each kind |
| `run`, `command` | the run itself, and how the command line starts it |
"""
