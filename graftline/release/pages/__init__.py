"""Pages of one file each: a run's report, a registry, a sweep."""
