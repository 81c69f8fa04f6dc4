"""Checkpoints and frameworks. Lazy: nothing here is imported until asked for."""
