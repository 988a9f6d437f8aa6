"""The `diptych` command and the clusters it runs on."""
