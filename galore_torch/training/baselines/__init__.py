"""What GaLore is compared with: matrices of low rank in the place of whole ones (LoRA, ReLoRA, W = BA)."""
