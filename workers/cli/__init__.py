"""The command line: thin; one file per group of commands. Nothing here is imported by anything else."""
