"""Other libraries' names and signatures. The only place with process-wide settings, where those libraries have them."""
