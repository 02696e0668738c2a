"""Self-contained HTML pages: a run's report, a registry, a sweep."""
