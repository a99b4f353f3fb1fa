"""Programs besides training: python -m tools.NAME."""
