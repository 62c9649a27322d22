"""Run probes: traces and measurements in their own processes, suites of runs, and files of measured rows."""
