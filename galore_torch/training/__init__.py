"""Pre-training, fine-tuning, comparing and inspecting, on Transformers' Trainer and Datasets.

A room imports only rooms named before it; `tests/test_architecture.py` holds them to it.

| room | what it answers |
| --- | --- |
| `settings` | how a setting is declared, checked, read and shown; the optimizer's settings; methods by name |
| `baselines` | what GaLore is compared with: LoRA, ReLoRA, W = BA |
| `run` | one run: its folder, records, checkpoints, signals, progress and plots |
| `text` | where text comes from, which tokenizer cuts it, how it becomes sequences |
| `page` | report pages for a browser |
| `pretrain` | ``galore pretrain`` |
| `finetune` | ``galore finetune`` |
| `planning` | ``galore plan``: what a training will need of memory, and send, by method |
| `evaluation` | ``galore evaluate`` and ``galore predict``, of a run or of any model |
| `inspection` | ``galore inspect``: how few dimensions hold the gradients, and for how long |
| `compare` | ``galore compare``: methods beside each other; the demo |

All of it needs the ``train`` extra; importing it without says so.
"""

from importlib.util import find_spec

from galore_torch.extras import install

_NEEDED = "accelerate datasets filelock matplotlib psutil pydantic rich tokenizers transformers typer".split()  # noqa: SIM905

_missing = [name for name in _NEEDED if find_spec(name) is None]
if _missing:
    raise ImportError(
        f"galore_torch.training needs {', '.join(_missing)}, which this environment does not have. {install('train')}"
    )
