"""Start, poll and stop a trainer. All else goes through the job's folder."""
