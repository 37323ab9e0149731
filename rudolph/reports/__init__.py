"""Results of experiments: exported tables, claims, figures, pages, their check, web pages."""
