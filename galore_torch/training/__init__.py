"""Pre-training, fine-tuning, comparing and inspecting, on Transformers' Trainer and Datasets.

| module | what it answers |
| --- | --- |
| `settings` | how a setting is declared once and checked, read from TOML, and shown in ``--help`` |
| `sections` | how settings stand in sections, and a file gives them |
| `config` | which settings a pre-training has |
| `presets` | which values the paper's models and the demo use |
| `methods` | which settings make the paper's method and its baselines |
| `adapter_config`, `adapters`, `restarts` | matrices of low rank in the place of whole ones: settings, layers, ReLoRA |
| `sources` | where documents come from |
| `tokenizer` | which tokenizer cuts them |
| `packing` | how documents become sequences of one length |
| `text` | the three in a row |
| `optimizers` | which optimizer a name stands for, and what the Trainer is handed |
| `run` | what every run does, from its first step to its last record |
| `pretrain` | the run of a pre-training; `finetune` has its own |
| `surroundings` | what a run asks of the machine |
| `command`, `flags`, `telling` | how the command line starts it, and tells what is wrong |
| `files`, `run_folder`, `records`, `metrics`, `plots`, `peak_memory` | what it leaves behind |
| `checkpoints`, `saving`, `locks` | how its states stay whole, and each run one process's |
| `progress`, `interrupt`, `guard`, `signals`, `units` | what it shows meanwhile, and how it is stopped |
| `compare_job`, `compare_settings`, `compare_plan` | methods beside each other: which runs, at which settings |
| `compare_runs`, `compare_display`, `child` | each run in a process of its own, and how far it is |
| `compare_score`, `compare_results`, `compare_figures`, `compare_report` | what they came to, on a page |
| `compare_command`, `default_command` | how the command line starts it: ``galore compare`` |
| `inspection` | how few dimensions hold the gradients, and for how long: ``galore inspect`` |
| `page`, `page_template` | pages for a browser |
| `demo` | GaLore beside full-rank AdamW in a few minutes |

All of it needs the ``train`` extra; importing it without says so.
"""

from importlib.util import find_spec

from galore_torch.extras import install

_NEEDED = ("accelerate", "datasets", "filelock", "matplotlib", "psutil", "rich", "tokenizers", "transformers", "typer")

_missing = [name for name in _NEEDED if find_spec(name) is None]
if _missing:
    raise ImportError(
        f"galore_torch.training needs {', '.join(_missing)}, which this environment does not have. {install('train')}"
    )
