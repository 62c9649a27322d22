"""From a run as written to a run with nothing left open; contradictions are refused."""
