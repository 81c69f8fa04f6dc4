"""Which kernel runs, why, and the launch."""
