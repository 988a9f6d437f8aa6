"""`diptych doctor`: check whether a cluster can train."""
