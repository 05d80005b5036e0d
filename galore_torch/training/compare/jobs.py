"""What can be compared: pre-trainings and fine-tunings."""

from galore_torch.training.finetune.command import FINETUNE
from galore_torch.training.pretrain.command import PRETRAIN

JOBS = {job.name: job for job in (PRETRAIN, FINETUNE)}
"""By name; the first is meant where none is named."""
