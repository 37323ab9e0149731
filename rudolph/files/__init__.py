"""File access: atomic writes, errors that name their file, and YAML settings."""
