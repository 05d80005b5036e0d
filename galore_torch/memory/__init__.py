"""What a training will need of memory, found by rehearsing it on tensors that have sizes and no numbers."""

from galore_torch.memory.plan import MemoryPlan, plan
from galore_torch.memory.recorder import KINDS
from galore_torch.memory.rehearsal import Job
from galore_torch.optim.state_size import stored_bytes, stored_in
from galore_torch.units import parse_bytes, readable

__all__ = ["KINDS", "Job", "MemoryPlan", "parse_bytes", "plan", "readable", "stored_bytes", "stored_in"]
