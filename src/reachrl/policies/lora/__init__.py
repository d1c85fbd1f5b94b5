"""LoRA adapters of any policy: training, peft files, merging."""
