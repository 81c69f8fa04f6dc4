"""The public ops. They validate and name the problem; nothing behind them raises on bad input."""
