"""Plain torch definitions of every op: oracle, documentation and CPU backend."""
