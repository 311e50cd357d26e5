"""A folder on the workers' Python path: Python imports `sitecustomize` from it before anything else."""
