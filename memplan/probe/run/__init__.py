"""Running probes: traces and measurements in processes of their own, suites, and kept rows."""
