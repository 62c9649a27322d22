"""What the user says: a run and its parts."""
