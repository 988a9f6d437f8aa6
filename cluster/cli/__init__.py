"""The `diptych` command: a file per group of commands, on one App."""
