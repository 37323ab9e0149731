"""Configuration: from YAML settings to checked, frozen runs, and from experiment files to runs."""
