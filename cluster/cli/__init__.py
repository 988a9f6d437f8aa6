"""The `diptych` command: one App, a file for each group of commands."""
