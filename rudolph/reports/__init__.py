"""Results of experiments: exported tables, claims, figures, pages, checks and web pages."""
