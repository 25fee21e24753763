"""What everything else stands on: torch, numpy and the standard library only."""
