"""Device code and its launch. `registry.py` names every kernel."""
