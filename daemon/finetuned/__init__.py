"""finetuned: drop a JSONL file into inbox/, find an adapter in adapters/."""

__version__ = "0.1.0"
