"""`diptych doctor`: whether a cluster can train."""
