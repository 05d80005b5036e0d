"""Fine-tuning: ``galore finetune``, on Transformers' Trainer and TRL's SFTTrainer."""
