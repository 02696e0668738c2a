"""What `graftline init` makes: a project with its own flows and tasks around the installed package."""
