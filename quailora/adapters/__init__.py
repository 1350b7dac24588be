"""Adapter formats. Today: LoRA, as PEFT stores it."""
