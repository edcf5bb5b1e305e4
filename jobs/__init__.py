"""The `pixart` command, its job files, and putting the same command line on a cluster."""
