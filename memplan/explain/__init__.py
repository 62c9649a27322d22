"""Why a run ran out of memory: its message, log or memory snapshot, joined to the estimate."""
