"""How a gradient is formed (full, projected as soon as complete, never formed), and when it is applied."""

from galore_torch.gradients.attachment import Attachment, attach, detach

__all__ = ["Attachment", "attach", "detach"]
