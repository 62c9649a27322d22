"""The gate of a team's runs: budgets, what each run takes of them, what changed and why, and the lock of facts."""
