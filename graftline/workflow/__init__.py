"""How the stages are run, by DVC and Prefect: the only package that knows either."""
