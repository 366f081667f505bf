"""Fine-tuning: an adapter taught to a model by examples (SFT), by rewards (GRPO) or by preferences (DPO)."""
