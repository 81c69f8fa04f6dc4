"""Other libraries' names and signatures. The only place with process-wide state."""
