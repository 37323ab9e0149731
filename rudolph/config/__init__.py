"""Configuration: YAML settings to checked, frozen runs, and experiment files to runs."""
