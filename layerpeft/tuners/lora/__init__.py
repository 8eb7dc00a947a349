"""LoRA on the chosen layers."""
