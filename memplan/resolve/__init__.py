"""From a run as it was asked to a run with nothing left open; contradictions are refused."""
