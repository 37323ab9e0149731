"""Results of experiments: exported tables, claims, figures, pages and their check."""
