"""A JSONL file in, checked chat rows and a report out. Used by the trainer and by hand; never by the daemon."""
