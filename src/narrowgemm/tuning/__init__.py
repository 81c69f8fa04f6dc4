"""Legal candidates, their predicted cost, and tuned tables as data."""
