"""What both worker roles share around an engine."""
